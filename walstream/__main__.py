"""``python -m walstream``."""

from walstream.cli import main

if __name__ == "__main__":
    main()
