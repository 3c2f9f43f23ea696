"""What every chapter shares: assets, timing, result records, kernels, the book itself and its command."""
