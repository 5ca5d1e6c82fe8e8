"""Adapter formats, canonical form, registry, blobs and memory tiers."""
