"""Transformers with manifold-constrained hyper-connections, for transformers.

A folder that `launch/export.py --format=huggingface` writes of a model with
mHC has a copy of this file, by which AutoModelForCausalLM loads it with
trust_remote_code=True. It needs torch and transformers, and nothing of mhc,
whose names for settings (under `model` in config.json) and tensors it has.

The streams x [.., n, d] of a token stand before every sub-layer F. With r the
root mean square of all n d numbers,

    [pre | post | res] = alpha (x phi) / r + bias
    h = sum_j sigmoid(pre_j) x_j
    x_i <- sum_j H_ij x_j + 2 sigmoid(post_i) F(norm(h))

where H is the Sinkhorn projection of res (mHC, arXiv 2512.24880, Eq. 7-9), or I
(kind 'identity'). Tensors are those of DeepSeek-V4, and of Hy4: fn = phi^T,
base = bias, scale = alpha, with res transposed. There is no cache of keys and
values: generation computes the whole row for each token.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin
from transformers import PretrainedConfig
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MhcConfig(PretrainedConfig):
  """The settings, as a nested dict `model`."""

  model_type = 'mhc'

  def __init__(self, model=None, **others):
    self.model = model or {}
    others.setdefault('tie_word_embeddings', False)
    super().__init__(**others)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * weight, in float32."""

  def __init__(self, dim, eps):
    super().__init__()
    self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

  def forward(self, x):
    wide = x.float()
    square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(square + self.eps) * self.weight).to(x.dtype)


class Connection(nn.Module):
  """Reads and writes the streams around a sub-layer."""

  def __init__(self, model):
    super().__init__()
    c, n = model['connection'], model['connection']['num_streams']
    self.n, self.eps, self.settings = n, model['norm_eps'], c
    self.has_res = c['kind'] == 'mhc'
    width = 2 * n + (n * n if self.has_res else 0)
    self.fn = nn.Parameter(torch.zeros(width, n * model['dim']))
    self.base = nn.Parameter(torch.zeros(width))
    self.scale = nn.Parameter(torch.zeros(3 if self.has_res else 2))

  def forward(self, x, sublayer):
    n, wide = self.n, x.flatten(-2).float()
    r = torch.sqrt(wide.square().mean(-1, keepdim=True) + self.eps)
    base, scale = self.base.float(), self.scale.float()
    raw = (wide @ self.fn.float().T) / r
    pre = torch.sigmoid(scale[0] * raw[..., :n] + base[:n])
    post = 2 * torch.sigmoid(scale[1] * raw[..., n : 2 * n] + base[n : 2 * n])
    h = torch.einsum('...n,...nd->...d', pre, x.float()).to(x.dtype)
    y = sublayer(h)
    mixed = x.float()
    if self.has_res:
      comb = scale[2] * raw[..., 2 * n :] + base[2 * n :]
      res = self.project(comb.unflatten(-1, (n, n)).transpose(-1, -2))
      mixed = torch.einsum('...ij,...jd->...id', res, mixed)
    return (mixed + post[..., None] * y.float()[..., None, :]).to(x.dtype)

  def project(self, logits):
    """The Sinkhorn iteration: columns, then rows."""
    eps = self.settings['sinkhorn_eps']
    matrix = torch.softmax(logits, -2) + eps
    matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
    for _ in range(self.settings['sinkhorn_iters'] - 1):
      matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
      matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
    return matrix


class Rope:
  """Rotation of the pairs (i, i + r/2), and what stretches it."""

  def __init__(self, attention):
    grouped = attention['kind'] == 'gqa'
    whole = attention['head_dim'] if grouped else 0
    self.size = attention['rope_dim'] or whole
    self.theta, self.scaling = (
      attention['rope_theta'],
      attention['rope_scaling'],
    )
    width = attention['head_dim'] + (0 if grouped else attention['rope_dim'])
    self.logit_scale = width**-0.5
    self.length = 1.0
    if self.scaling['kind'] == 'yarn':
      both = self._m(self.scaling['mscale_all_dim'])
      self.length = self._m(self.scaling['mscale']) / both
      self.logit_scale *= both**2

  def _m(self, weight):
    return 1 + 0.1 * weight * math.log(self.scaling['factor'])

  def rates(self, device):
    half, s = self.size // 2, self.scaling
    pairs = torch.arange(half, dtype=torch.float32, device=device)
    rate = self.theta ** (-pairs / half)
    if s['kind'] == 'none':
      return rate
    if s['kind'] == 'linear':
      return rate / s['factor']
    if s['kind'] == 'llama3':
      turns = s['original_length'] * rate / (2 * math.pi)
      kept = (turns - s['low_freq']) / (s['high_freq'] - s['low_freq'])
    else:
      first, last = (self._pair(s[name]) for name in ('beta_fast', 'beta_slow'))
      first = max(math.floor(first), 0)
      last = min(math.ceil(last), self.size - 1)
      kept = 1 - (pairs - first) / (last - first or 0.001)
    kept = kept.clamp(0, 1)
    return rate * kept + rate / s['factor'] * (1 - kept)

  def _pair(self, turns):
    length = self.scaling['original_length'] / (turns * 2 * math.pi)
    return self.size * math.log(length, self.theta) / 2

  def __call__(self, x):
    """Turns the first numbers of x [b, t, h, k]."""
    position = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
    angles = position[:, None] * self.rates(x.device)
    cos, sin = (
      (turn(angles) * self.length)[None, :, None]
      for turn in (torch.cos, torch.sin)
    )
    turned, rest = x[..., : self.size].float(), x[..., self.size :]
    first, second = turned.chunk(2, -1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([torch.cat(turned, -1).to(x.dtype), rest], -1)


def attend(query, key, value, scale):
  """Causal attention of [b, t, h, k], in float32."""
  query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
  repeats = query.shape[1] // key.shape[1]
  key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
  mixed = functional.scaled_dot_product_attention(
    query, key, value, is_causal=True, scale=scale
  )
  return mixed.transpose(1, 2).flatten(2)


class LatentAttention(nn.Module):
  """Keys and values from one latent vector of a token."""

  def __init__(self, model):
    super().__init__()
    c, dim = model['attention'], model['dim']
    heads, k, r, rank = (
      c[name] for name in ('num_heads', 'head_dim', 'rope_dim', 'kv_rank')
    )
    eps = c['latent_norm_eps'] or model['norm_eps']
    low = c['query_rank']
    if low:
      self.query_down = nn.Linear(dim, low, bias=False)
      self.query_norm = RMSNorm(low, eps)
    self.query = nn.Linear(low or dim, heads * (k + r), bias=False)
    self.down = nn.Linear(dim, rank + r, bias=False)
    self.norm = RMSNorm(rank, eps)
    self.up = nn.Linear(rank, heads * 2 * k, bias=False)
    self.out = nn.Linear(heads * k, dim, bias=False)
    self.c, self.rope = c, Rope(c)

  def forward(self, x):
    k, heads = self.c['head_dim'], self.c['num_heads']
    low = x
    if self.c['query_rank']:
      low = self.query_norm(self.query_down(x))
    query = self.query(low).unflatten(-1, (heads, -1))
    latent, key_rope = self.down(x).split(
      [self.c['kv_rank'], self.c['rope_dim']], -1
    )
    key, value = (
      self.up(self.norm(latent)).unflatten(-1, (heads, -1)).chunk(2, -1)
    )
    turned = self.rope(query[..., k:])
    query = torch.cat([query[..., :k], turned], -1)
    key_rope = self.rope(key_rope[:, :, None]).expand(-1, -1, heads, -1)
    key = torch.cat([key, key_rope], -1)
    mixed = attend(query, key, value, self.rope.logit_scale)
    return self.out(mixed.to(x.dtype))


class GroupedAttention(nn.Module):
  """Keys and values for groups of heads."""

  def __init__(self, model):
    super().__init__()
    c, dim = model['attention'], model['dim']
    k, bias = c['head_dim'], c['qkv_bias']
    narrow = c['num_kv_heads'] * k
    self.query = nn.Linear(dim, c['num_heads'] * k, bias=bias)
    self.key = nn.Linear(dim, narrow, bias=bias)
    self.value = nn.Linear(dim, narrow, bias=bias)
    if c['qk_norm']:
      self.query_norm = RMSNorm(k, model['norm_eps'])
      self.key_norm = RMSNorm(k, model['norm_eps'])
    self.out = nn.Linear(c['num_heads'] * k, dim, bias=False)
    self.c, self.rope = c, Rope(c)

  def forward(self, x):
    query, key, value = (
      each(x).unflatten(-1, (-1, self.c['head_dim']))
      for each in (self.query, self.key, self.value)
    )
    if self.c['qk_norm']:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = self.rope(query), self.rope(key)
    mixed = attend(query, key, value, self.rope.logit_scale)
    return self.out(mixed.to(x.dtype))


class SwiGLU(nn.Module):
  """(silu(x W_gate) * x W_up) W_down."""

  def __init__(self, dim, hidden):
    super().__init__()
    self.gate = nn.Linear(dim, hidden, bias=False)
    self.up = nn.Linear(dim, hidden, bias=False)
    self.down = nn.Linear(hidden, dim, bias=False)

  def forward(self, x):
    return self.down(functional.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
  """Which experts a token visits, and with which gates."""

  def __init__(self, dim, moe):
    super().__init__()
    self.weight = nn.Parameter(torch.zeros(moe['num_experts'], dim))
    self.bias = nn.Parameter(torch.zeros(moe['num_experts']))
    self.moe = moe

  def forward(self, x):
    moe = self.moe
    scores = torch.sigmoid(x.float() @ self.weight.float().T)
    ranking = scores + (self.bias.float() if moe['router'] == 'bias' else 0)
    groups, some = moe['num_groups'], moe['groups_per_token']
    if groups != some:
      by_group = ranking.unflatten(-1, (groups, -1))
      best = by_group.topk(2, -1)[0].sum(-1).topk(some, -1)[1]
      inside = torch.zeros_like(by_group[..., 0], dtype=torch.bool)
      inside.scatter_(-1, best, True)
      ranking = by_group.masked_fill(~inside[..., None], -math.inf).flatten(-2)
    chosen = ranking.topk(moe['experts_per_token'], -1)[1]
    gates = scores.gather(-1, chosen)
    if moe['normalize_gates']:
      gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return chosen, gates * moe['gate_scale']


class MoE(nn.Module):
  """Routed experts, and shared ones that every token visits."""

  def __init__(self, model):
    super().__init__()
    moe, dim = model['moe'], model['dim']
    self.router = Router(dim, moe)
    self.experts = nn.ModuleList(
      SwiGLU(dim, moe['expert_dim']) for _ in range(moe['num_experts'])
    )
    self.shared = None
    if moe['num_shared']:
      self.shared = SwiGLU(dim, moe['num_shared'] * moe['expert_dim'])

  def forward(self, x):
    chosen, gates = self.router(x)
    out = torch.zeros_like(x) if self.shared is None else self.shared(x)
    for number, expert in enumerate(self.experts):
      gate = (gates * (chosen == number)).sum(-1)
      rows = gate != 0
      if rows.any():
        found = expert(x[rows]) * gate[rows][:, None].to(x.dtype)
        out = out.index_put(rows.nonzero(as_tuple=True), found, accumulate=True)
    return out


class Block(nn.Module):
  """Attention and feed-forward, each with a norm inside its connection."""

  def __init__(self, model, number):
    super().__init__()
    dim, eps, moe = model['dim'], model['norm_eps'], model['moe']
    grouped = model['attention']['kind'] == 'gqa'
    self.attention_connection = Connection(model)
    self.attention_norm = RMSNorm(dim, eps)
    self.attention = (GroupedAttention if grouped else LatentAttention)(model)
    self.ffn_connection = Connection(model)
    self.ffn_norm = RMSNorm(dim, eps)
    if moe['num_experts'] and number >= moe['num_dense_blocks']:
      self.ffn = MoE(model)
    else:
      self.ffn = SwiGLU(dim, model['ffn_dim'])

  def forward(self, x):
    x = self.attention_connection(
      x, lambda h: self.attention(self.attention_norm(h))
    )
    return self.ffn_connection(x, lambda h: self.ffn(self.ffn_norm(h)))


class Collapse(nn.Module):
  """The streams as one, by weights of their own."""

  def __init__(self, model):
    super().__init__()
    n, self.eps = model['connection']['num_streams'], model['norm_eps']
    self.fn = nn.Parameter(torch.zeros(n, n * model['dim']))
    self.base = nn.Parameter(torch.zeros(n))
    self.scale = nn.Parameter(torch.zeros(1))

  def forward(self, x):
    wide = x.flatten(-2).float()
    r = torch.sqrt(wide.square().mean(-1, keepdim=True) + self.eps)
    logits = (
      wide @ self.fn.float().T / r * self.scale.float() + self.base.float()
    )
    weights = torch.sigmoid(logits) + 1e-6
    return torch.einsum('...n,...nd->...d', weights, x.float()).to(x.dtype)


class MhcForCausalLM(PreTrainedModel, GenerationMixin):
  """tokens [b, t] -> logits [b, t, v], float32."""

  config_class = MhcConfig
  _no_split_modules = ('Block',)

  def __init__(self, config):
    super().__init__(config)
    model = config.model
    self.embed = nn.Embedding(model['vocab_size'], model['dim'])
    self.layers = nn.ModuleList(
      Block(model, number) for number in range(model['num_blocks'])
    )
    self.collapse = None
    if model['connection']['collapse'] == 'learned':
      self.collapse = Collapse(model)
    self.norm = RMSNorm(model['dim'], model['norm_eps'])
    self.head = None
    if not model['tied_embeddings']:
      self.head = nn.Linear(model['dim'], model['vocab_size'], bias=False)
    self.post_init()

  def forward(self, input_ids=None, labels=None, **others):
    c = self.config.model['connection']
    x = self.embed(input_ids)
    x = x[..., None, :].expand(*x.shape[:-1], c['num_streams'], -1)
    for layer in self.layers:
      x = layer(x)
    if self.collapse is not None:
      h = self.collapse(x)
    else:
      h = x.float().sum(-2) if c['collapse'] == 'sum' else x.float().mean(-2)
    h = self.norm(h.to(x.dtype))
    head = self.embed.weight if self.head is None else self.head.weight
    logits = h.float() @ head.to(h.dtype).float().T
    loss = None
    if labels is not None:
      loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
      )
    return CausalLMOutput(loss=loss, logits=logits)

  def prepare_inputs_for_generation(self, input_ids, **others):
    return {'input_ids': input_ids}

  def get_input_embeddings(self):
    return self.embed

  def set_input_embeddings(self, value):
    self.embed = value

  def get_output_embeddings(self):
    return self.head

  def _init_weights(self, module):
    """Weights come from a folder; nothing is drawn."""
