"""Which globals a checkpoint may name, and which refuse the whole file.

Nothing named here is ever imported; the tables decide what an inert token *means* (`torch_objects`)
and when a file is refused outright. Three answers:

* table: a call whose meaning we know; a tensor may depend on it,
* dangerous: something that could run code if another tool loaded the file; the file is refused,
* anything else: inert; reported beside the weights, refused on the way to a tensor.
"""

from __future__ import annotations

from flamingo_ckpt.tensors import TORCH_DTYPES

#: Modules of which every name refuses the file (with their submodules).
_DANGEROUS_MODULES = frozenset(
    """
    _aix_support _ctypes _io _operator _osx_support _pickle _posixsubprocess _pyrepl _thread
    _xxsubinterpreters aiohttp antigravity asyncio atexit bdb bz2 cPickle cProfile cffi cgi cgitb
    cloudpickle cmd code codeop commands compileall concurrent crypt ctypes dbm dill dis distutils
    doctest ensurepip fabric faulthandler fileinput fsspec ftplib gc graphlib gzip http httplib
    httpx idlelib imaplib imp importlib inspect io IPython joblib jsonpickle keyring lib2to3
    linecache lzma mailbox mailcap marshal mmap modulefinder msvcrt multiprocessing nntplib nox nt
    ntpath numpy.ctypeslib numpy.distutils numpy.f2py numpy.testing operator optparse os paramiko
    pdb pexpect pickle pickletools pip pkg_resources pkgutil platform popen2 poplib posix posixpath
    profile pstats psutil ptyprocess pty py_compile _pytest pytest pyclbr pydoc readline requests
    rlcompleter runpy sched select selectors setuptools shelve shutil signal site smtpd smtplib
    socket socketserver sqlite3 ssl subprocess symtable sys sysconfig tarfile telnetlib tempfile
    test threading timeit tkinter trace turtle turtledemo unittest urllib urllib2 urllib3 venv
    webbrowser winreg wsgiref xml xmlrpc zipapp zipfile zipimport torch._C torch._classes
    torch._dynamo torch._export torch._inductor torch._jit_internal torch._ops
    torch.autograd.profiler torch.classes torch.compiler torch.cuda.graphs torch.cuda.jiterator
    torch.distributed.elastic torch.distributed.launch torch.distributed.rpc torch.distributed.run
    torch.export torch.fx torch.hub torch.jit torch.library torch.multiprocessing torch.onnx
    torch.ops torch.package torch.profiler torch.serialization torch.testing torch.utils
    torch.utils.data.datapipes
    """.split()
)
#: Python 2 and 3 builtins: these types and sums are harmless, every other name refuses.
_BUILTIN_MODULES = frozenset({"builtins", "__builtin__", "__builtins__"})
_HARMLESS_BUILTINS = frozenset(
    """
    bool bytearray bytes complex dict float frozenset int list long object range set slice str
    tuple unicode xrange abs all any hash len max min pow print round sum
    Ellipsis NotImplemented NoneType ArithmeticError AssertionError AttributeError Exception
    IndexError KeyError OSError RuntimeError TypeError ValueError
    """.split()
)
#: Names that run or reach code wherever they live.
_DANGEROUS_NAMES = frozenset(
    """
    __import__ __builtins__ __globals__ __subclasses__ __getattribute__ attrgetter breakpoint
    check_output compile delattr eval exec execfile execl execle execlp execlpe execv execve execvp
    execvpe fork getattr globals import_module kill posix_spawn posix_spawnp rmdir rmtree unlink
    write_bytes write_text
    itemgetter load_module load_library locals methodcaller popen Popen run_code run_module run_path
    runcode runstring setattr spawnl spawnv startfile system
    """.split()
)
_DANGEROUS_EXACT = frozenset(
    {
        ("codecs", "open"),
        ("functools", "reduce"),
        ("torch", "load"),
        ("torch", "compile"),
        ("types", "CodeType"),
        ("types", "FunctionType"),
        ("types", "LambdaType"),
        ("types", "MethodType"),
        ("types", "ModuleType"),
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy", "loadtxt"),
        ("numpy", "genfromtxt"),
        ("numpy", "memmap"),
        ("numpy", "save"),
        ("numpy", "savez"),
        ("numpy", "savetxt"),
        ("logging.config", "listen"),
        ("logging.config", "fileConfig"),
        ("logging.config", "dictConfig"),
        ("logging", "FileHandler"),
        ("pandas", "read_pickle"),
        ("torch.storage", "_load_from_bytes"),
        ("uuid", "_get_command_stdout"),
    }
)
# Plain data that training checkpoints carry, from modules that are refused otherwise; the longest
# module name that is listed decides.
_HARMLESS_MODULES = frozenset({"torch.utils.data", "torch.utils.hooks"})
_HARMLESS_EXACT = frozenset(
    {
        ("copy_reg", "_reconstructor"),
        ("copyreg", "_reconstructor"),
        ("_io", "BytesIO"),
        ("io", "BytesIO"),
        ("torch.jit._pickle", "build_intlist"),
        ("torch.jit._pickle", "build_doublelist"),
        ("torch.jit._pickle", "build_boollist"),
        ("torch.jit._pickle", "build_tensorlist"),
        ("torch.jit._pickle", "build_tensor_from_id"),
        ("torch.jit._pickle", "restore_type_tag"),
        ("torch.serialization", "_get_layout"),
        ("torch._C", "Generator"),
    }
)


def is_dangerous(module: str, name: str) -> bool:
    """Whether the file must be refused for merely naming this.

    >>> is_dangerous("posix", "system"), is_dangerous("argparse", "Namespace")
    (True, False)
    """
    if (module, name) in _HARMLESS_EXACT:
        return False
    if module in _BUILTIN_MODULES:
        return name not in _HARMLESS_BUILTINS
    if (module, name) in _DANGEROUS_EXACT:
        return True
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        package = ".".join(parts[:end])
        if package in _DANGEROUS_MODULES:
            return True
        if package in _HARMLESS_MODULES:
            break
    # A dotted name walks attributes: `torch` + `serialization.os.system` is `os.system`.
    walked = name.split(".")
    # So is `random` + `_os.system`: the standard library imports under private names.
    if any(_DANGEROUS_MODULES & {part, part.lstrip("_")} for part in walked[:-1]):
        return True
    # No class that a checkpoint carries is named by a walk that ends in a lower-case word.
    if len(walked) > 1 and walked[-1][:1].islower():
        return True
    return any(part in _DANGEROUS_NAMES for part in walked)


_REBUILD = "torch._utils"
#: (module, name) of every call that leads to a tensor, and how `torch_objects` reads it.
REBUILDERS: dict[tuple[str, str], str] = {
    (_REBUILD, "_rebuild_tensor"): "tensor_v1",
    (_REBUILD, "_rebuild_tensor_v2"): "tensor_v2",
    (_REBUILD, "_rebuild_tensor_v3"): "tensor_v3",
    (_REBUILD, "_rebuild_parameter"): "inner",
    (_REBUILD, "_rebuild_parameter_with_state"): "inner",
    ("torch.nn.parameter", "Parameter"): "inner",
    ("torch.nn.parameter", "Buffer"): "inner",
    ("torch._tensor", "_rebuild_from_type_v2"): "typed",
    ("torch", "_rebuild_from_type_v2"): "typed",
}
#: Calls that make a tensor of a kind that no dense format can hold: (module, name) -> kind.
UNSUPPORTED_TENSORS: dict[tuple[str, str], str] = {
    (_REBUILD, "_rebuild_sparse_tensor"): "sparse",
    (_REBUILD, "_rebuild_sparse_csr_tensor"): "sparse",
    (_REBUILD, "_rebuild_qtensor"): "quantized",
    (_REBUILD, "_rebuild_nested_tensor"): "nested",
    (_REBUILD, "_rebuild_meta_tensor_no_storage"): "meta",
    (_REBUILD, "_rebuild_wrapper_subclass"): "wrapper-subclass",
    (_REBUILD, "_rebuild_device_tensor_from_numpy"): "device",
    (_REBUILD, "_rebuild_device_tensor_from_cpu_tensor"): "device",
    (_REBUILD, "_rebuild_xla_tensor"): "XLA",
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): "nested",
    ("torch.distributed.tensor", "DTensor"): "distributed (DTensor)",
    ("torch.distributed._tensor.api", "DTensor"): "distributed (DTensor)",
    ("torch.distributed.tensor._api", "DTensor"): "distributed (DTensor)",
    ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"): "distributed (ShardedTensor)",
}
#: The types that `_rebuild_from_type_v2` may name: anything else may override how bytes are read.
PLAIN_TENSOR_TYPES = frozenset(
    {("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")}
)
#: Dict types whose entries are their pairs and nothing else.
DICT_TYPES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("collections", "Counter"),
        ("builtins", "dict"),
        ("__builtin__", "dict"),
    }
)
#: Legacy storage classes: the name before `Storage` -> dtype.
STORAGE_DTYPES: dict[str, str] = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
    "ComplexDouble": "C128",
}
_STORAGE_MODULES = frozenset({"torch", "torch.cuda", "torch.storage"})
#: Storage classes of quantized tensors.
QUANTIZED_STORAGES = frozenset({"QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4"})
#: Plain data that training loops leave behind: inert, and no news.
_PLAIN_DATA = frozenset(
    {
        ("collections", "deque"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        *(("builtins", name) for name in ("bytearray", "complex", "range", "set", "slice")),
        *(("__builtin__", name) for name in ("bytearray", "complex", "set", "slice")),
        ("_codecs", "encode"),
    }
)
_INERT_TORCH = frozenset(
    """
    Size device dtype strided sparse_coo sparse_csr per_tensor_affine per_channel_affine
    per_tensor_symmetric per_channel_symmetric per_channel_affine_float_qparams
    qint8 qint32 quint8 quint4x2 quint2x4
    """.split()
)


def storage_class(module: str, name: str) -> str | None:
    """`Float` for `torch.FloatStorage`, `Untyped` for `torch.storage.UntypedStorage`, else None."""
    if module in _STORAGE_MODULES and name.endswith("Storage"):
        return name.removesuffix("Storage")
    return None


def in_table(module: str, name: str) -> bool:
    """Whether the meaning of this global is known, so that a tensor may depend on it."""
    pair = (module, name)
    return (
        pair in REBUILDERS
        or pair in DICT_TYPES
        or pair in PLAIN_TENSOR_TYPES
        or storage_class(module, name) is not None
        or (module == "torch" and (name in _INERT_TORCH or name in TORCH_DTYPES))
        or pair in _PLAIN_DATA
    )
