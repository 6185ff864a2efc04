from setuptools import setup

# All metadata stands in pyproject.toml. The compiled extension of csrc/ will be declared here.
setup()
