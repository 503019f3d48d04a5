"""`python -m zimage_train` and `accelerate launch -m zimage_train` are the `zimage-train` command."""

from zimage_train.cli import main

if __name__ == "__main__":
    main()
