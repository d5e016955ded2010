"""One module per backend; each defines `unsupported`, `forward`, `backward` and `linear`."""
