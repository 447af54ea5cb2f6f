"""Makes the stub's job known in every Python that a launcher starts; tests put this folder on PYTHONPATH."""

from stub_command import add_jobs

add_jobs()
