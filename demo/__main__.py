"""`python run.py demo`: see demo/edit.py."""

import sys

from demo.edit import main

if __name__ == "__main__":
    sys.exit(main())
