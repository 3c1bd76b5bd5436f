"""`python -m prefix_attn`: the command line, see `prefix_attn.cli`."""

import sys

from prefix_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m prefix_attn"))
