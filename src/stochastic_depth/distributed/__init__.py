"""What training on several processes needs of a skipped block."""
