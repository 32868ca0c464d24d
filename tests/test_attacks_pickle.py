"""Pickles that would run code: nothing is run, and the file is refused where it must be."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fixtures import handmade as hm
from tests.attacks_support import (
    Leaves,
    converted,
    finding_codes,
    inspected,
    put_file,
    refused,
)

# Callables that published scanners missed or report, in every spelling the advisories name.
CODE_RUNNERS = """
    os.system posix.system nt.system os.popen os.execv os.spawnl os.posix_spawn posix.popen
    subprocess.Popen subprocess.call subprocess.run subprocess.check_output subprocess.getoutput
    builtins.eval builtins.exec builtins.compile builtins.getattr builtins.setattr
    builtins.__import__ builtins.open builtins.input builtins.breakpoint builtins.globals
    builtins.vars builtins.map builtins.filter builtins.type builtins.apply
    __builtin__.eval __builtin__.execfile __builtin__.getattr __builtin__.apply runpy.run_path
    runpy.run_module runpy._run_code pty.spawn pip.main pip._internal.main code.interact
    code.InteractiveInterpreter codeop.compile_command pdb.run bdb.Bdb cProfile.run
    cProfile.runctx profile.run profile.Profile trace.Trace timeit.timeit doctest.debug_script
    ensurepip._run_pip venv.create test.support.script_helper.assert_python_ok
    importlib.import_module importlib.reload pkgutil.resolve_name zipimport.zipimporter
    imp.load_source marshal.loads pickle.loads pickle.Unpickler _pickle.loads cloudpickle.loads
    dill.loads joblib.load types.FunctionType types.CodeType ctypes.CDLL ctypes.windll cffi.FFI
    operator.attrgetter operator.methodcaller operator.itemgetter _operator.attrgetter
    socket.socket socket.create_connection urllib.request.urlopen urllib.request.urlretrieve
    requests.get http.client.HTTPSConnection ftplib.FTP smtplib.SMTP imaplib.IMAP4_stream
    telnetlib.Telnet webbrowser.open asyncio.create_subprocess_shell multiprocessing.Process
    threading.Thread concurrent.futures.ThreadPoolExecutor _thread.start_new_thread
    shutil.rmtree shutil.copyfile tempfile.mkstemp io.open io.FileIO _io.FileIO codecs.open
    sys.exit sys.setprofile signal.signal atexit.register gc.get_objects inspect.getsource
    sqlite3.connect shelve.open dbm.open fileinput.input logging.config.listen
    distutils.file_util.write_file lib2to3.pgen2.grammar.Grammar.loads
    idlelib.pyshell.ModifiedInterpreter pydoc.pipepager xmlrpc.server.resolve_dotted_attribute
    unittest.mock._importer uuid._get_command_stdout _osx_support._read_output
    _aix_support._read_cmd_output torch.load torch.hub.load torch.jit.load
    torch.package.PackageImporter torch.compile torch.ops.load_library
    torch.utils.bottleneck.__main__.run_cprofile torch.utils.collect_env.run
    torch.utils._config_module.load_config torch.utils.cpp_extension.load
    torch._dynamo.guards.GuardBuilder.get torch._inductor.codecache.compile_file
    torch.jit.unsupported_tensor_ops.execWrapper
    torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
    torch.distributed.rpc.rpc_sync torch.serialization.load torch.storage._load_from_bytes
    numpy.load numpy.fromfile numpy.f2py.crackfortran.getlincoef
    numpy.testing._private.utils.runstring numpy.distutils.exec_command.exec_command
    pandas.read_pickle
    """.split()


def _named(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return hm.named(module, name)


@pytest.mark.parametrize("dotted", CODE_RUNNERS)
def test_a_global_that_could_run_code_refuses_the_file_wherever_it_stands(
    dotted: str, tmp_path: Path
) -> None:
    beside = hm.call(_named(dotted), hm.text("true"))
    body = hm.mapping([("state_dict", hm.state_dict()), ("note", beside)])
    text = refused(put_file(tmp_path, hm.torch_zip(body)), "FC501")
    assert dotted in text


def test_merely_naming_it_is_enough(tmp_path: Path) -> None:
    body = hm.mapping([("state_dict", hm.state_dict()), ("note", _named("os.system"))])
    refused(put_file(tmp_path, hm.torch_zip(body)), "FC501")


def _spellings(function: bytes, argument: bytes) -> dict[str, bytes]:
    """Every opcode that makes Python's own unpickler call or build something."""
    keywords = hm.mapping([])
    return {
        "REDUCE": function + b"(" + argument + b"tR",
        "NEWOBJ": function + b"(" + argument + b"t\x81",
        "NEWOBJ_EX": function + b"(" + argument + b"t" + keywords + b"\x92",
        "OBJ": b"(" + function + argument + b"o",
        "BUILD": function + b")\x81" + hm.mapping([("__class__", argument)]) + b"b",
    }


@pytest.mark.parametrize("spelling", [*_spellings(b"", b""), "INST"])
@pytest.mark.parametrize("container", ["zip", "legacy", "script"])
def test_no_opcode_runs_anything(spelling: str, container: str, tmp_path: Path) -> None:
    payload = Leaves(tmp_path)
    assert payload.works(), "otherwise this test could not fail"
    command = hm.text(payload.command)
    calls = _spellings(hm.named("posix", "system"), command)
    calls["INST"] = b"(" + command + b"iposix\nsystem\n"
    pairs = [("weight", hm.tensor()), ("note", calls[spelling])]
    wrapped = {
        "zip": lambda: hm.torch_zip(hm.mapping(pairs)),
        "legacy": lambda: hm.legacy(hm.mapping(pairs)),
        "script": lambda: hm.script_zip(hm.module("Net", pairs)),
    }[container]()
    refused(put_file(tmp_path, wrapped), "FC501")
    assert not payload.mark.exists()


@pytest.mark.parametrize("spelling", [*_spellings(b"", b""), "INST"])
def test_an_unknown_object_beside_the_weights_stays_inert(spelling: str, tmp_path: Path) -> None:
    objects = _spellings(hm.named("mytrainer.state", "Progress"), hm.number(3))
    objects["INST"] = b"(" + hm.number(3) + b"imytrainer.state\nProgress\n"
    body = hm.mapping([("state_dict", hm.state_dict()), ("progress", objects[spelling])])
    path = put_file(tmp_path, hm.torch_zip(body))
    document = inspected(path)
    assert document["pickle_globals"]["mytrainer.state.Progress"] == "inert"
    assert "FC506" in finding_codes(document)
    assert converted(path) == {"weight": ("F32", [2, 2], hm.WEIGHT)}


@pytest.mark.parametrize("spelling", [*_spellings(b"", b""), "INST"])
def test_a_tensor_that_depends_on_an_unknown_object_refuses_the_file(
    spelling: str, tmp_path: Path
) -> None:
    objects = _spellings(hm.named("mymodels", "Quantized"), hm.tensor())
    objects["INST"] = b"(" + hm.tensor() + b"imymodels\nQuantized\n"
    body = hm.mapping([("weight", objects[spelling]), ("bias", hm.tensor())])
    refused(put_file(tmp_path, hm.torch_zip(body)), "FC502")


@pytest.mark.parametrize(
    ("where", "body"),
    {
        "a dict subclass": hm.named("mylib", "Dict")
        + b")\x81("
        + hm.text("w")
        + hm.tensor()
        + b"u",
        "a parameter of it": hm.mapping(
            [
                (
                    "w",
                    hm.call(
                        hm.named("torch._utils", "_rebuild_parameter"),
                        hm.call(hm.named("mylib", "make"), hm.tensor()),
                        b"\x88",
                        hm.call(hm.named("collections", "OrderedDict")),
                    ),
                )
            ]
        ),
        "a tensor subclass": hm.mapping(
            [
                (
                    "w",
                    hm.call(
                        hm.named("torch._tensor", "_rebuild_from_type_v2"),
                        hm.named("torch._utils", "_rebuild_tensor_v2"),
                        hm.named("mylib", "Tensor"),
                        hm.group(hm.storage(), hm.number(0), hm.naturals((4,)), hm.naturals((1,))),
                        hm.mapping([]),
                    ),
                )
            ]
        ),
        "a storage class": hm.mapping([("w", hm.tensor(hm.storage(kind="MyStorage")))]),
        "a storage of a module": hm.mapping([("w", hm.tensor(hm.storage(module="mylib")))]),
    }.items(),
)
def test_unknown_classes_on_the_way_to_a_tensor(where: str, body: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(body)), "FC502")


def test_module_objects_of_torchscript_are_the_exception(tmp_path: Path) -> None:
    inner = hm.module("Linear", [("training", b"\x89"), ("weight", hm.tensor())])
    code = "import os\nos.system('true')\n"
    path = put_file(tmp_path, hm.script_zip(hm.module("Net", [("fc", inner)]), code))
    assert inspected(path)["inputs"][0]["format"] == "torchscript"
    assert converted(path) == {"fc.weight": ("F32", [2, 2], hm.WEIGHT)}


def test_the_same_objects_outside_torchscript_are_not(tmp_path: Path) -> None:
    inner = hm.module("Linear", [("weight", hm.tensor())])
    refused(put_file(tmp_path, hm.torch_zip(inner)), "FC502")


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_the_extension_registry_is_not_consulted(opcode: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(hm.state_dict(note=opcode))), "FC110")


@pytest.mark.parametrize("opcode", [b"Pid\n", b"\x97", b"\x98", b"\xff", b"\x00", b"\x80\x06"])
def test_opcodes_that_torch_never_writes(opcode: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(hm.state_dict(note=opcode))), "FC110")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "serialization.os.system"),
        ("collections", "OrderedDict.__init__.__globals__.eval"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.utils.bottleneck.__main__", "run_cprofile"),
        ("os.path", "os.system"),
    ],
)
def test_a_dotted_name_is_not_walked(module: str, name: str, tmp_path: Path) -> None:
    walked = hm.call(hm.stack_named(module, name), hm.text("true"))
    refused(put_file(tmp_path, hm.torch_zip(hm.state_dict(note=walked))), "FC501")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2 "),
        ("torch._utils ", "_rebuild_tensor_v2"),
        ("Torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v22"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("", "torch._utils._rebuild_tensor_v2"),
    ],
)
def test_the_table_matches_whole_names_only(module: str, name: str, tmp_path: Path) -> None:
    args = (hm.storage(), hm.number(0), hm.naturals((2, 2)), hm.naturals((2, 1)), b"\x89")
    hooks = hm.call(hm.named("collections", "OrderedDict"))
    lookalike = hm.call(hm.stack_named(module, name), *args, hooks)
    body = hm.mapping([("weight", lookalike)])
    # Its argument is a storage, no tensor: there is nothing in the file that could be weights.
    refused(put_file(tmp_path, hm.torch_zip(body)), {"FC201", "FC501", "FC502"})


@pytest.mark.parametrize(
    "operands",
    [
        hm.number(1) + hm.text("system"),
        hm.text("os") + hm.number(1),
        hm.text("os") + hm.group(hm.text("system")),
        b"C\x02os" + hm.text("system"),
        b"N" + b"N",
        hm.named("mylib", "os") + hm.text("system"),
        hm.get(7) + hm.text("system"),
        hm.text("system"),
        b"",
    ],
)
def test_stack_global_takes_two_strings(operands: bytes, tmp_path: Path) -> None:
    note = operands + b"\x93"
    body = hm.mapping([("state_dict", hm.state_dict()), ("note", note)])
    # With too few operands of its own it takes the key below: `note.system` is refused by name.
    refused(put_file(tmp_path, hm.torch_zip(body)), {"FC110", "FC501"})


@pytest.mark.parametrize("piece", range(5))
def test_every_pickle_of_a_legacy_stream_is_read_by_the_same_machine(
    piece: int, tmp_path: Path
) -> None:
    payload = Leaves(tmp_path)
    parts = hm.legacy_parts(hm.state_dict())
    parts[piece] = hm.pickled(payload.opcodes())
    # A first pickle that is not the magic number, letter by letter, makes it no torch file at all.
    refused(put_file(tmp_path, b"".join(parts)), "FC112" if piece == 0 else "FC501")
    assert not payload.mark.exists()


@pytest.mark.parametrize("end", [b"\xff", b"", b"(", b"0" * 50, b"\x8d" + b"\xff" * 8])
def test_a_payload_before_a_broken_stream_is_not_run(end: bytes, tmp_path: Path) -> None:
    payload = Leaves(tmp_path)
    records = hm.torch_records(b"")
    broken = hm.Record(name="m/data.pkl", data=b"\x80\x02" + payload.opcodes() + end)
    refused(put_file(tmp_path, hm.zipped([broken, *records[1:]])), "FC501")
    harmless = hm.Record(name="m/data.pkl", data=b"\x80\x02" + hm.state_dict() + end)
    path = put_file(tmp_path, hm.zipped([harmless, *records[1:]]), "harmless.pt")
    refused(path, {"FC102", "FC110"})
    assert not payload.mark.exists()


def test_a_pickle_behind_the_weights_is_not_opened(tmp_path: Path) -> None:
    payload = Leaves(tmp_path)
    extra = hm.Record(name="m/extra.pkl", data=hm.pickled(payload.opcodes()))
    loose = hm.Record(name="m/data/9", data=struct.pack("<f", 9.0))
    path = put_file(tmp_path, hm.zipped([*hm.torch_records(hm.state_dict()), extra, loose]))
    document = inspected(path)
    assert [f["key"] for f in document["findings"] if f["code"] == "FC113"] == [
        "m/data/9",
        "m/extra.pkl",
    ]
    assert converted(path) == {"weight": ("F32", [2, 2], hm.WEIGHT)}
    assert not payload.mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("random", "_os.execlp"),
        ("random", "_os.posix_spawn"),
        ("argparse", "_os.remove"),
        ("collections", "_sys.modules"),
        ("logging", "os.execlp"),
        ("pathlib", "Path.unlink"),
        ("pathlib", "PosixPath.write_text"),
        ("pexpect", "spawn"),
        ("pytest", "main"),
        ("_pytest.config", "main"),
    ],
)
def test_walks_and_runners_that_hide_in_harmless_modules(
    module: str, name: str, tmp_path: Path
) -> None:
    for number, spelled in enumerate((hm.named(module, name), hm.stack_named(module, name))):
        body = hm.mapping([("state_dict", hm.state_dict()), ("note", spelled)])
        refused(put_file(tmp_path, hm.torch_zip(body), f"{number}.pt"), "FC501")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("collections", "deque"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("builtins", "complex"),
        ("builtins", "slice"),
    ],
)
def test_plain_data_beside_the_weights_is_no_news(module: str, name: str, tmp_path: Path) -> None:
    beside = hm.call(hm.named(module, name), hm.number(1))
    body = hm.mapping([("state_dict", hm.state_dict()), ("note", beside)])
    document = inspected(put_file(tmp_path, hm.torch_zip(body)))
    assert finding_codes(document) == set()


@pytest.mark.parametrize(("module", "name"), [("builtins", "print"), ("torch._C", "Generator")])
def test_harmless_callables_do_not_refuse(module: str, name: str, tmp_path: Path) -> None:
    beside = hm.call(hm.named(module, name), hm.text("x"))
    body = hm.mapping([("state_dict", hm.state_dict()), ("note", beside)])
    assert list(converted(put_file(tmp_path, hm.torch_zip(body)))) == ["weight"]
