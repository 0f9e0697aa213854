"""The command `python -m llava.shapes.training`, see run.py."""

from llava.shapes.training.run import main

if __name__ == "__main__":
    main()
