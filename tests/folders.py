"""Folders of this machine or of a bucket, in tests."""

from mhc.runtime import files


def copy(source, target):
  """Copies all files of a folder."""
  for file in files.all_files(source):
    to = target / file.relative_to(source)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(file.read_bytes())


def names(folder) -> list[str]:
  """The names of all files of a folder."""
  return [str(file.relative_to(folder)) for file in files.all_files(folder)]
