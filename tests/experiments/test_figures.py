"""The figures of the report, drawn from plain data."""

import functools
import itertools
import math

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
import numpy as np
import pytest

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.experiments import figure_style as style
from mhc.experiments import figures
from mhc.experiments import figures_depth
from mhc.experiments import figures_heat
from mhc.experiments import plots
from mhc.experiments import sections

NAMES = (
  *style.COLORS,
  *('mhc_static', 'residual_params', 'residual_memory', 'a', 'b', 'c'),
)
LONG = 'lower by 0.0101 [0.0010, 0.0192], within the margin of 0.01'


def contrast(kind='mhc', **changes):
  return {
    'panel': 'quality',
    'setting': {'model.num_blocks': 8, 'model.dim': 64},
    'kind': kind,
    'other': 'residual',
    'seeds': [0, 1, 2, 3],
    'differences': [-0.02, -0.01, -0.005, -0.012],
    **{'mean': -0.0118, 'low': -0.0218, 'high': -0.0018},
    **{'sd': 0.006, 'mde': 0.02, 'p': 0.01, 'p_holm': 0.03},
    **{'verdict': LONG, 'declared': True, 'margin': 0.01},
  } | changes


def row(variant='mhc', seed=0, **changes):
  return {
    **{'panel': 'q', 'variant': variant, 'kind': variant, 'seed': seed},
    **{'setting': {}, 'blocks': 4, 'lr': 0.003, 'num_streams': 4},
    **{'sinkhorn_iters': 20, 'dim': 64, 'tokens': 1e6, 'flops': 1e12},
    **{'heldout_nats': 2.5 + 0.01 * seed, 'gap_nats': -0.01 - 0.001 * seed},
    **{'gain_max': 2.0, 'gain_fwd_max': 1.0, 'gain_bwd_max': 2.0 + seed},
    **{'stream_cosine': 0.5, 'column_residual': None, 'loss_spikes': 0},
    'step_time_ratio': 1.2,
  } | changes


@functools.cache
def texts(figure):
  """Everything that is written in a figure, after its layout."""
  figure.draw_without_rendering()
  found = (one for one in figure.findobj(Text) if one.get_visible())
  return [one for one in found if one.get_text()]


def words(figure):
  return [one.get_text() for one in texts(figure)]


def undrawn_ticks(axis):
  """Labels that matplotlib keeps for ticks it may need, or that are outside."""
  for part in (axis.xaxis, axis.yaxis):
    low, high = sorted(part.get_view_interval())
    used = {*part.get_major_ticks(), *part.get_minor_ticks()}
    for tick in (*part.majorTicks, *part.minorTicks):
      if tick not in used or not low <= tick.get_loc() <= high:
        yield from (tick.label1, tick.label2)


def assert_legible(figure):
  """All labels lie inside the figure and none on another."""
  renderer = FigureCanvasAgg(figure).get_renderer()
  width, height = figure.canvas.get_width_height()
  boxes = {}
  written = texts(figure)
  undrawn = {text for axis in figure.axes for text in undrawn_ticks(axis)}
  for text in written:
    if text not in undrawn and (text.axes is None or text.axes.get_visible()):
      boxes[text] = text.get_window_extent(renderer)
  for text, box in boxes.items():
    inside = box.x0 > -1 and box.y0 > -1
    inside &= box.x1 < width + 1 and box.y1 < height + 1
    assert inside, text
  for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
    apart = a.x1 < b.x0 + 1 or b.x1 < a.x0 + 1
    assert apart or a.y1 < b.y0 + 1 or b.y1 < a.y0 + 1, (one, other)


def test_looks_are_the_designs_own():
  found = {name: style.look(name, NAMES) for name in NAMES}
  assert found == {name: style.look(name, NAMES[::-1]) for name in NAMES}
  for key in ('color', 'marker', 'line', 'label'):
    values = [getattr(look, key) for look in found.values()]
    assert len(set(values)) == len(NAMES), key
  assert found['mhc_static'].label == 'mHC static'
  assert found['mhc_lite'].label == 'mHC-lite'
  assert found['residual_params'].label == 'residual params'
  # More names than looks repeat some.
  assert style.look('x99', [f'x{i}' for i in range(100)]).label == 'x99'


@pytest.mark.parametrize('number', [1, 3, 12])
def test_a_forest_is_legible(number):
  lines = [
    contrast(
      NAMES[1 + i],
      declared=i < 7,
      verdict=LONG if i < 7 else '',
      setting={'model.num_blocks': 2**i, 'optimizer.learning_rate': 0.003},
    )
    for i in range(number)
  ]
  figure = figures.forest(lines[::-1])
  assert_legible(figure)
  axis = figure.axes[0]
  labels = [one.get_text().replace('\n', ' ') for one in axis.get_yticklabels()]
  several = ', 1 block' if number > 1 else ''
  assert f'quality: HC - residual{several}' in labels
  assert not any('lr' in one for one in labels)
  said = [one.get_text().replace('\n', ' ') for one in axis.texts]
  assert said.count(LONG) == min(number, 7)
  assert said[7:] == ['-0.0118 [-0.0218, -0.0018]'] * (number - len(said[:7]))
  dots = [one for one in axis.lines if one.get_marker() == '.']
  assert [len(one.get_xdata()) for one in dots] == [4] * number


def test_a_forest_of_little():
  assert figures.forest([]) is None
  none = {'mean': None, 'low': None, 'high': None}
  lines = [
    contrast(seeds=[0], differences=[0.003], **none, verdict='not tested'),
    contrast('own', differences=[None, math.inf, 0.1, -0.1], **none),
    contrast('own', **none | {'mean': 0.02}, verdict='', declared=False),
    contrast(margin=None, verdict='', **none, declared=False, differences=[]),
  ]
  figure = figures.forest(lines)
  assert_legible(figure)
  found = words(figure)
  assert {'+0.0200', 'not estimated', 'not finite', 'exploratory'} < {*found}
  crosses = [one for one in figure.axes[0].lines if one.get_marker() == 'x']
  assert len(crosses) == 1
  far = contrast(differences=[3.0, 3.1, 3.0, 3.2], mean=3.1, low=3.0, high=3.2)
  assert figures.forest([contrast(), contrast()] * 3 + [far]).axes[
    0
  ].get_xscale() == ('symlog')


def test_rates():
  assert figures.rates([], {}) is None
  rows = [
    row(design, seed, lr=lr)
    for design in ('residual', 'mhc', 'own')
    for lr in (1e-3, 2e-3, 4e-3)
    for seed in (0, 1)
  ]
  for one, loss in zip(rows[-2:], (None, math.inf), strict=True):
    one['heldout_nats'] = loss
  figure = figures.rates(rows, {'mhc': 2e-3, 'own': 4e-3})
  assert_legible(figure)
  axis = figure.axes[0]
  rings = [one for one in axis.lines if one.get_markersize() == 12]
  np.testing.assert_allclose(
    [r.get_xydata()[0] for r in rings], [[2e-3, 2.505]]
  )
  assert len([one for one in axis.lines if one.get_marker() == 'x']) == 1
  assert [one.get_text() for one in axis.texts] == [r'$\times$2']
  lines = [one for one in axis.lines if len(one.get_xdata()) == 3]
  assert np.isfinite([one.get_ydata() for one in lines]).sum() == 8
  assert {'0.001', 'own', 'chosen rate'} < {*words(figure)}
  alone = figures.rates([row(heldout_nats=None)])
  assert 'not finite (runs)' in words(alone)


def test_over_compute():
  assert figures.over_compute([]) is None
  curve = {
    **{'kind': 'mhc', 'other': 'residual', 'flops': [1e12, 4e12, None]},
    **{'tokens': [1e6, 2e6, 4e6], 'mean': [-0.01, -0.02, None]},
    **{'low': [-0.02, None, None], 'high': [0.0, None, None]},
    'band': [[12.0, -0.02, 0.0], [13.0, -0.04, -0.02]],
  }
  other = curve | {'other': 'a_name', 'band': None}
  figure = figures.over_compute([curve, other])
  assert_legible(figure)
  assert {'mHC - residual', 'mHC - a name'} < {*words(figure)}
  first, second = figure.axes
  assert len(first.containers) == len(second.containers) == 2
  assert len(first.containers[0].lines[0].get_xdata()) == 2
  # The bars of each curve, the band of one.
  assert (len(first.collections), len(second.collections)) == (3, 2)
  many = [curve | {'kind': kind} for kind in NAMES[1:13]]
  assert_legible(figures.over_compute(many))
  alike = figures.over_compute([curve | {'tokens': [1e6, 1e6, 1e6]}])
  assert [axis.get_xlabel() for axis in alike.axes] == ['training FLOPs']


def test_ablation():
  cells = [
    {'kind': kind, 'pre': pre, 'post': post, 'res': res}
    | {'mean': 0.01, 'low': low, 'high': 0.02}
    for low, kind in ((-0.01, 'hc'), (0.005, 'mhc'))
    for pre, post, res in itertools.product(figures_heat.STATES, repeat=3)
  ]
  cells[0]['mean'] = None
  figure = figures_heat.ablation(cells)
  assert_legible(figure)
  hc, mhc = figure.axes[:2]
  assert (len(hc.texts), len(mhc.texts)) == (26, 27)
  assert mhc.texts[0].get_text() == '+0.0100\n[+0.0050, +0.0200]'
  assert (hc.texts[0].get_weight(), mhc.texts[0].get_weight()) == (
    'normal',
    'bold',
  )
  alone = figures_heat.ablation([cells[-1] | {'low': None, 'high': None}])
  assert_legible(alone)
  assert '+0.0100' in words(alone)
  assert figures_heat.ablation(cells[:1]) is None


def test_designs_of_which_none_changes_a_mapping_are_no_ablation(tmp_path):
  kind = ('model.connection.kind', 'mhc')
  static = ('static', (kind, ('model.connection.pre', 'static')))
  values = ('values', (kind, ('model.attention.value_residual', True)))

  def drawn(*designs):
    panel = comparison_lib.Panel(
      title='parts', kinds=('residual',), designs=designs
    )
    comparison = comparison_lib.Comparison(config.Config(), {'parts': panel})
    found = [contrast(name, panel='parts') for name, _ in designs]
    return sections.ablation(tmp_path, comparison, found)

  assert drawn(values) == []
  assert drawn(static, ('all', (kind,)))[0].text == 'Parts of a connection'


def test_stability():
  assert figures_heat.stability([]) is None
  rows = [
    row(design, seed, lr=lr, blocks=blocks, loss_spikes=seed % 2)
    for design in ('residual', 'own', 'mhc')
    for lr in (1e-3, 2e-3, 4e-3, 8e-3)
    for blocks in (2, 4)
    for seed in range(4)
  ]
  rows[0]['heldout_nats'] = None
  figure = figures_heat.stability(rows)
  assert_legible(figure)
  found = words(figure)
  assert found.count('2 of 4\n[0.07, 0.93]') == 23
  assert found.count('3 of 4\n[0.19, 0.99]') == 1
  assert {'own', 'mHC', 'learning rate', 'blocks'} < {*found}
  alone = figures_heat.stability([row('own')])
  assert_legible(alone)
  assert '0 of 1\n[0.00, 0.97]' in words(alone)


def profile(design, depth=16):
  layer = np.arange(1, depth + 1)
  return {
    'design': design,
    'sigma_diff_init': (0.9**layer).tolist(),
    'sigma_diff': (0.1**layer).tolist(),
    'effective_rank': (1 + 3 * 0.5**layer).tolist(),
    'entropy': [None, *(1 - 0.5 ** layer[1:]).tolist()],
    'pre_mean': [[0.1, 0.2, 0.3, 0.4]] * depth,
    'post_mean': [[1.0, 1.0, 1.0, 1.5]] * depth,
    'streams_read': [2.0] * depth,
  }


def test_contraction():
  assert figures_depth.contraction([]) is None
  figure = figures_depth.contraction([profile('mhc'), profile('own')])
  assert_legible(figure)
  sigma, rank, entropy = figure.axes
  # Trained and at step 0 of each, and the line for scale.
  assert [len(axis.lines) for axis in figure.axes] == [5, 2, 2]
  assert min(sigma.lines[0].get_ydata()) == style.SMALLEST
  assert (sigma.get_yscale(), entropy.get_ylim()) == ('log', (-0.03, 1.03))
  assert rank.get_ylim()[0] == 0.9
  assert {'own', 'at step 0', '$0.98^l$'} < {*words(figure)}
  one = profile('own', 1) | {'sigma_diff_init': None, 'entropy': None}
  alone = figures_depth.contraction([one])
  assert_legible(alone)
  assert len(alone.axes) == 2


def test_reads():
  assert figures_heat.reads([]) is None
  assert figures_heat.reads([{'design': 'residual', 'pre_mean': None}]) is None
  figure = figures_heat.reads([profile(name) for name in NAMES[1:5]])
  assert_legible(figure)
  # Three designs, and a bar for H_pre and H_post.
  assert len(figure.axes) == 11
  assert {'HC: H_pre', 'identity: H_post', 'streams read'} < {*words(figure)}
  assert figure.axes[0].images[0].get_array().shape == (4, 16)
  assert_legible(figures_heat.reads([profile('own', 1)]))


def test_depth():
  assert figures_depth.depth([]) is None
  one = {'design': 'mhc', 'blocks': [2, 4, 8]}
  one |= {'sigma_diff': [0.9, 0.5, 0.0], 'half_life': [30.0, 20.0, None]}
  figure = figures_depth.depth([one, one | {'design': 'own'}])
  assert_legible(figure)
  sigma, half = figure.axes
  assert (len(sigma.lines), len(half.lines)) == (3, 5)
  np.testing.assert_allclose(sigma.lines[2].get_ydata()[-1], 0.98**16)
  assert {'never halves', '$0.98^L$, L = 2 x blocks'} < {*words(figure)}
  alone = {'design': 'own', 'blocks': [4], 'sigma_diff': [1], 'half_life': [3]}
  assert_legible(figures_depth.depth([alone]))


def test_over_axis():
  axis = 'model.connection.num_streams'
  assert figures_depth.over_axis([], axis, ['mhc']) is None
  rows = [
    row(design, seed, setting={axis: n}, column_residual=residual)
    for design, residual in (('mhc', 0.01), ('own', 0.0), ('hc', None))
    for n in (2, 4, 8)
    for seed in range(3)
  ]
  figure = figures_depth.over_axis(rows, axis, ['mhc', 'own'])
  assert_legible(figure)
  gap, column, gain, time = figure.axes
  mean, caps, _ = gap.containers[0].lines
  half = 0.001 * 4.302653 / math.sqrt(3)
  np.testing.assert_allclose(mean.get_ydata(orig=False), [-0.011] * 3)
  np.testing.assert_allclose(
    caps[1].get_ydata(orig=False), [-0.011 + half] * 3, rtol=1e-6
  )
  floor = column.containers[1].lines[0].get_ydata()[0]
  assert floor == pytest.approx(style.SMALLEST)
  geometric = gain.containers[0].lines[0].get_ydata()[0]
  np.testing.assert_allclose(geometric, (2 * 3 * 4) ** (1 / 3))
  assert [t.get_text() for t in time.get_xticklabels()] == ['2', '4', '8']
  assert {'mHC', 'own', 'streams n'} < {*words(figure)}
  assert 'HC' not in words(figure)


@pytest.mark.parametrize(
  ('axis', 'values'), [('sinkhorn_iters', [20]), ('a.word', ['x', 'y', False])]
)
def test_over_axis_of_little(axis, values):
  few = {'gap_nats': None, 'step_time_ratio': math.inf}
  rows = [row('own', setting={axis: value}, **few) for value in values]
  figure = figures_depth.over_axis(rows, axis, ['own', 'mhc'])
  assert_legible(figure)
  assert [one.get_title() for one in figure.axes] == ['backward gain']
  ticks = [one.get_text() for one in figure.axes[0].get_xticklabels()]
  assert sorted(ticks) == sorted(map(str, values))


def test_files(tmp_path):
  figure = Figure((1, 1))
  figure.text(0.1, 0.5, 'a word')
  names = [style.save(figure, tmp_path / 'new', name) for name in 'ab']
  assert names == ['a.png', 'b.png']
  for ending, start in (('png', b'\x89PNG'), ('pdf', b'%PDF')):
    a, b = ((tmp_path / 'new' / f'{n}.{ending}').read_bytes() for n in 'ab')
    assert a.startswith(start)
    assert a == b
  # Fonts are embedded as TrueType.
  assert b'/Type3' not in a
  with pytest.raises(ValueError, match='letters'):
    style.save(figure, tmp_path, '../a')


@pytest.mark.parametrize(('steps', 'left'), [(10, 1), (25, 1), (40, 16)])
def test_a_run_shorter_than_the_window_is_smoothed(steps, left):
  smooth = plots._smooth(np.ones(steps))
  np.testing.assert_allclose(smooth, np.ones(left))
