"""What can be known without a GPU: checks, memory, time and cost."""
