"""`python -m llmtrain` is the console script."""

from llmtrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
