"""`python -m nirvana`: the command line."""

from nirvana.cli import main

if __name__ == "__main__":
    main()
