"""`python3 -m rxe_lab` is the command `rxe-lab`."""

from rxe_lab.command import main

main()
