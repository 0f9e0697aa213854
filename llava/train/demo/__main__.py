"""`python -m llava.train.demo`: see run.py."""

from llava.train.demo.run import main

if __name__ == "__main__":
    main()
