"""`python -m layerpeel`, as launchers of several processes start it: `accelerate launch -m layerpeel run ...`."""

from layerpeel.cli.process import main

if __name__ == "__main__":
    main()
