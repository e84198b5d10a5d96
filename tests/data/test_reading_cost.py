"""`bench.py data`: reads are counted, and waits are shares of a step."""

from mhc.data import reading_cost
from mhc.data import token_dataset


def test_every_way_of_reading_is_measured(tmp_path):
  reading_cost.make_folder(tmp_path, 2**19)
  assert len(token_dataset.read(tmp_path).train[0]) == 2**19
  rows = list(
    reading_cost.rows(
      tmp_path, batch_size=4, step_s=0.02, latency_s=0.002, num_steps=5
    )
  )
  ways = {(row['block_rows'], row['read_ahead']): row for row in rows}
  assert set(ways) == {(1, 0), (1, 4), (64, 0), (64, 4)}
  assert all(row['rows_s'] > 0 < row['share_of_disk'] for row in rows)
  # A read each row, or each block.
  assert ways[1, 0]['reads_a_step'] == 4
  assert ways[64, 0]['reads_a_step'] < 1
  # Four reads of 2 ms in a step of 20 ms, which nothing hides.
  assert ways[1, 0]['wait'] >= 0.4
