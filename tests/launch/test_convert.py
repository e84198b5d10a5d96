"""From a folder of Hugging Face to a run with connections, by the mains."""

import huggingface_reference as reference

NUMBERS = (
  '--config.num_steps=2',
  '--config.optimizer.warmup_steps=0',
  '--config.optimizer.trained=connections',
  '--config.data.seq_len=8',
  '--config.data.batch_size=2',
  '--config.mesh.num_devices=1',
  '--config.eval_sequences=2',
  '--config.final_sequences=2',
  '--config.probe_every=0',
)


def test_a_model_gets_connections_and_is_trained(launch, text, tmp_path):
  llama, start = tmp_path / 'llama', tmp_path / 'start'
  llama.mkdir()
  reference.random_folder(llama, 'LlamaForCausalLM', num_hidden_layers=1)
  to = '--to=mhc', '--num_streams=2', f'--out={start}'
  made = launch('convert.py', f'--from={llama}', *to)
  assert made.returncode == 0, made.stderr
  assert 'as mhc; logits differ by' in made.stdout
  done = launch(
    'train.py',
    f'--workdir={tmp_path / "run"}',
    f'--config=from_folder:{start}',
    f'--config.data.path={text}',
    *NUMBERS,
  )
  assert done.returncode == 0, done.stderr

  alone, whole = tmp_path / 'alone', tmp_path / 'whole'
  done = launch(
    'export.py',
    f'--workdir={tmp_path / "run"}',
    '--only=connections',
    f'--out={alone}',
  )
  assert done.returncode == 0, done.stderr
  back = f'--from={llama}', f'--connections={alone}', f'--out={whole}'
  done = launch('convert.py', *back)
  assert f'with the connections of {alone}' in done.stdout, done.stderr
  for flags, message in (
    ((*back, '--num_streams=2'), '--num_streams=2 would not be used'),
    (
      # The default, but asked for.
      (f'--from={tmp_path / "run"}', '--num_streams=4', f'--out={tmp_path}/x'),
      "kind='mhc' already, of 2",
    ),
    (
      (f'--from={tmp_path / "run"}', '--to=hc', f'--out={tmp_path / "x"}'),
      "connection.kind='mhc', this model 'hc'",
    ),
    (
      (f'--from={llama}', '--to=attn_res', f'--out={tmp_path / "x"}'),
      "kind='attn_res' would not start as the model in",
    ),
  ):
    refused = launch('convert.py', *flags)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
  refused = launch(
    'train.py', f'--workdir={tmp_path}', f'--config=from_folder:{llama}'
  )
  assert 'launch/convert.py --from=' in refused.stderr
