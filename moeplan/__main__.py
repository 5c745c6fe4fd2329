"""`python -m moeplan` is the command `moeplan`."""

from moeplan.cli import main

if __name__ == "__main__":
    main()
