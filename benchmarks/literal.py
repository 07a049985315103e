"""What two literal forms have in common: the library's own layers where this package has its own."""
from torch import nn

from medssl_nb.nets.uniformer3d import Attention, Depthwise, UniFormerEncoder


class Table(nn.Module):
    "Attention with its table of all pairs."
    def __init__(self, a): super().__init__(); self.a = a
    def forward(self, t):
        a,(B,N,C) = self.a,t.shape
        q,k,v = a.qkv(t).view(B, N, 3, a.heads, C//a.heads).permute(2, 0, 3, 1, 4)
        return a.out(((q@k.transpose(-2, -1)*(C//a.heads)**-.5).softmax(-1)@v).transpose(1, 2).reshape(B, N, C))

def plain(module):
    "The same network from the library's own layers, its maps channel by channel."
    if isinstance(module, UniFormerEncoder): module.rows = False
    for n,m in list(module.named_children()):
        if isinstance(m, Depthwise):
            c = nn.Conv3d(m.weight.shape[0], m.weight.shape[0], m.weight.shape[2:], padding=m.weight.shape[2]//2, groups=m.weight.shape[0])
            c.weight,c.bias = m.weight,m.bias; setattr(module, n, c)
        elif isinstance(m, Attention): setattr(module, n, Table(m))
        else: plain(m)
    return module
