"""What the `pixelllm` command can do: options and work of one command a file."""
