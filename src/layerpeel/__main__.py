"""`python -m layerpeel`, as launchers of several processes want it: `accelerate launch -m layerpeel run ...`."""

from layerpeel.cli import main

main()
