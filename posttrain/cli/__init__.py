"""The command line: ``posttrain COMMAND``."""
