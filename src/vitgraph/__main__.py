"""`python -m vitgraph`."""

from vitgraph.cli import main

if __name__ == "__main__":
    main()
