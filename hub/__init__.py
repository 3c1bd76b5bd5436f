"""Writes the package as a kernel for Hugging Face's hub: `python -m hub`."""
