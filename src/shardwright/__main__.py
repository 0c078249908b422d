"""`python -m shardwright` is `shardwright`."""

from shardwright.cli.main import main

main()
