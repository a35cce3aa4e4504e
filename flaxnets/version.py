"""The version of flaxnets, for the package's metadata and for what it writes."""

VERSION = '0.1.0'
