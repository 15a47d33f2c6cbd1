"""The ``dsv3`` command: one thin file a subcommand, each with ``run(argv) -> exit status``."""
