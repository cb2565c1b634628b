"""`python -m vdt_workflows` is the command `vdt`."""

from vdt_workflows.cli import main

main()
