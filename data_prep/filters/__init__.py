"""Filters: samples that are not wanted, each counted under the option that took it, and never as rejected."""
