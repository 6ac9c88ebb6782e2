"""What any launched process of ours has: ranks, signals, failures, output, tracking."""
