"""The program's version, as every output's receipt has it. The package's metadata is made from this."""

VERSION = "0.1.0"
