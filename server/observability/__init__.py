"""What people and machines see of a running server: log lines, the record of a request, traces."""
