"""`python -m flamingo_ckpt`."""

from flamingo_ckpt.cli.main import main

if __name__ == "__main__":
    main()
