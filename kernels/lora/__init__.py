"""Segmented LoRA: y[t] += sum_i w_i s_i B_i A_i x[t] for the adapters i of the token's set."""
