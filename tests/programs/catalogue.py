# SPDX-License-Identifier: Apache-2.0
"""Programs that people run, one data row each; scripts/real-programs runs all of them.

A row is a shell script (`sh -euc`, in a private /tmp) and a regular expression that the whole of
its output must match, stderr included: a warning that a program has only inside is a fault as
well. bubblewrap with the host's /usr, /etc and /var read-only is the measure: what passes there
passes in nsbox. Rows with `small` are tests, too (test_catalogue.py), where their programs are
installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nsbox


@dataclass(frozen=True, kw_only=True)
class Program:
    """One row."""

    name: str
    packages: str = ""
    """Debian packages, separated by blanks."""
    command: str
    """Text for `sh -euc`."""
    expected: str = ""
    """Regular expression for all of stdout and stderr, blanks at both ends left out."""
    programs: str = ""
    """What must be in PATH to run the row, where that is not the row's name; for `small` rows."""
    small: bool = False
    """Whether the row is a test of the suite."""
    strict: bool = True
    """Whether it works with `strict`, too."""
    memory: str = "1G"
    tmp_size: str = "256M"
    timeout: float = 120.0

    def is_installed(self) -> bool:
        """Whether its programs are in PATH."""
        return all(shutil.which(program) for program in (self.programs or self.name).split())

    def matches(self, output: str) -> bool:
        """Whether `output` is what is expected."""
        return re.fullmatch(self.expected, output.strip(), re.DOTALL) is not None


PROGRAMS: tuple[Program, ...] = (
    # What has its configuration in /etc, or more of itself in /var/lib.
    Program(
        name="javac",
        packages="default-jdk-headless",
        command="""
cat > A.java <<'END'
import java.util.stream.*;
public class A {
    public static void main(String[] arguments) throws Exception {
        System.out.println(IntStream.rangeClosed(1, 6).sum());
        System.out.println(javax.net.ssl.SSLContext.getDefault().getProtocol());
    }
}
END
javac A.java; java -cp . A
""",
        expected="21\nDefault",
        programs="javac java",
        small=True,
    ),
    Program(
        name="maven",
        packages="maven",
        command="""
cat > pom.xml <<'END'
<project><modelVersion>4.0.0</modelVersion><groupId>a</groupId><artifactId>a</artifactId>
<version>1</version><packaging>pom</packaging></project>
END
mvn -B -o validate | grep -c 'BUILD SUCCESS'
""",
        expected=r"(\x1b\[0m)*1",
        programs="mvn",
    ),
    Program(
        name="ghc",
        packages="ghc",
        command="""
cat > a.hs <<'END'
import qualified Data.Map as M
main = print (M.toList (M.fromListWith (+) [(x `mod` 3, x) | x <- [1 .. 10 :: Int]]))
END
ghc -v0 -O a.hs; ./a
""",
        expected=r"\[\(0,18\),\(1,22\),\(2,15\)\]",
        tmp_size="512M",
    ),
    Program(
        name="Rscript",
        packages="r-base-core",
        command="Rscript -e 'cat(sum(1:10), round(coef(lm(dist ~ speed, cars)), 2))'",
        expected="55 -17.58 3.93",
    ),
    Program(
        name="mono",
        packages="mono-mcs mono-runtime",
        command="""
echo 'class A { static void Main() { System.Console.WriteLine(6 * 7); } }' > a.cs
mcs a.cs; mono a.exe
""",
        expected="42",
        programs="mcs mono",
    ),
    Program(
        name="fpc",
        packages="fpc",
        command="""
printf "program a; uses sysutils; begin writeln(UpperCase('pear'), 6 * 7) end.\\n" > a.pas
fpc -v0 a.pas > log 2>&1 || { cat log; exit 1; }
./a
""",
        expected="PEAR42",
    ),
    Program(
        name="php",
        packages="php-cli",
        command="""
cat > a.php <<'END'
<?php
$more = count(explode(",", php_ini_scanned_files()));
echo json_encode([strtoupper("pear"), php_ini_loaded_file() !== false, $more > 3]);
END
php a.php
""",
        expected=r'\["PEAR",true,true\]',
        small=True,
    ),
    Program(
        name="pdflatex",
        packages="texlive-latex-base",
        command="""
printf '%s\\n' '\\documentclass{article}' '\\usepackage{amsmath}' '\\begin{document}' \
    'Pears: $\\sum_{i=1}^n i$.' '\\end{document}' > a.tex
pdflatex -interaction=batchmode -halt-on-error a.tex > log 2>&1 || { cat log; exit 1; }
head -c 5 a.pdf
""",
        expected="%PDF-",
    ),
    Program(
        name="libreoffice",
        packages="libreoffice-writer-nogui",
        command="""
echo pears > a.txt
soffice --headless --convert-to pdf a.txt > log 2>&1 || { cat log; exit 1; }
head -c 5 a.pdf
""",
        expected="%PDF-",
        programs="soffice",
    ),
    Program(
        name="imagemagick",
        packages="imagemagick",
        command="""
convert -size 64x64 gradient:red-blue a.png
identify -format '%m %wx%h\\n' a.png
identify -list policy | grep -c Policy:
""",
        expected="PNG 64x64\n[1-9][0-9]*",
        programs="convert identify",
    ),
    Program(
        name="ocamlfind",
        packages="ocaml-nox ocaml-findlib",
        command="""
echo 'let () = print_endline (String.concat "," (Str.split (Str.regexp " ") "pear fig"))' > a.ml
ocamlfind ocamlopt -package str -linkpkg a.ml -o a; ./a
""",
        expected="pear,fig",
    ),
    Program(
        name="cobc",
        packages="gnucobol",
        command="""
printf '%s\\n' 'identification division.' 'program-id. a.' 'procedure division.' \
    'display "PEAR".' 'stop run.' > a.cob
cobc -x -free a.cob; ./a
""",
        expected="PEAR",
    ),
    Program(
        name="ldc2",
        packages="ldc",
        command="echo 'import std.stdio; void main() { writeln(6 * 7); }' > a.d; ldc2 a.d; ./a",
        expected="42",
    ),
    Program(
        name="emacs",
        packages="emacs-nox",
        command="""
emacs --batch --eval '(progn (require (quote json)) (princ (json-encode (list 1 2 (* 6 7)))))'
""",
        expected=r"(Loading /etc/emacs/\S+ \(source\)\.\.\.\n)*\[1,2,42\]",
        small=True,
    ),
    Program(
        name="chromium",
        packages="chromium",
        command="""
echo '<p id=p></p><script>p.textContent = [3, 1, 2].sort()</script>' > a.html
chromium --headless --no-sandbox --disable-gpu --dump-dom file:///tmp/a.html 2>log || cat log
""",
        expected='.*<p id="p">1,2,3</p>.*',
        timeout=180.0,
    ),
    Program(
        name="alternatives",
        packages="mawk",
        command="awk 'BEGIN { print 6 * 7 }'; readlink /usr/bin/awk",
        expected="42\n/etc/alternatives/awk",
        programs="awk",
        small=True,
    ),
    Program(
        name="sort",
        packages="coreutils",
        command="seq 20000 | sort -rn | tail -n 1",
        expected="1",
        small=True,
    ),
    Program(
        name="cp",
        packages="coreutils",
        command="echo a > a; cp -p a b; cp -a a /dev/shm/c; cat b /dev/shm/c",
        expected="a\na",
    ),
)


def in_nsbox(program: Program, profile: str = "default") -> tuple[bool, str]:
    """Return whether the row passes in nsbox, and what it printed."""
    result = nsbox.run(
        ["sh", "-euc", f"exec 2>&1\n{program.command}"],
        cwd="/tmp",
        timeout=program.timeout,
        seccomp=profile,
        tmp_size=program.tmp_size,
        limits=nsbox.Limits(memory_max=program.memory),
        allow_missing={"cgroup.memory"},
    )
    output = result.text()
    if not result.ok:
        return False, f"{output.strip()}\n[{result.outcome.value}, exit code {result.exit_code}]"
    return program.matches(output), output


def in_bubblewrap(program: Program) -> tuple[bool, str]:
    """Return whether the row passes in bubblewrap, and what it printed."""
    words = [
        *(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] * (os.geteuid() == 0)),
        *("bwrap", "--unshare-all", "--die-with-parent", "--uid", "1000", "--gid", "1000"),
        *(word for path in ("/usr", "/etc", "/var") for word in ("--ro-bind", path, path)),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
        *("--setenv", "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if Path(path).is_symlink():
            words += ["--symlink", os.readlink(path), path]
        elif Path(path).is_dir():
            words += ["--ro-bind", path, path]
    try:
        done = subprocess.run(
            [*words, "sh", "-euc", f"exec 2>&1\n{program.command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=program.timeout,
        )
    except subprocess.TimeoutExpired:
        return False, f"[not done after {program.timeout:g} s]"
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        return False, f"{output.strip()}\n[exit code {done.returncode}]"
    return program.matches(output), output


def is_there(program: Program) -> bool:
    """Whether the row's packages are installed."""
    words = ["dpkg-query", "--show", "--showformat", "${Status}\n", *program.packages.split()]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.count("ok installed") == done.stdout.count("\n")


def install(programs: Sequence[Program]) -> None:
    """Install what the rows need, by apt."""
    packages = sorted({name for program in programs for name in program.packages.split()})
    words = ["apt-get", "-o", "DPkg::Lock::Timeout=600", "install", "-qq", "-y"]
    subprocess.run(
        [*words, "--no-install-recommends", *packages, "bubblewrap"],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def main() -> int:
    """Print the table; 1 if a row passes in bubblewrap and not in nsbox."""
    parser = argparse.ArgumentParser(prog="scripts/real-programs", description=main.__doc__)
    parser.add_argument("--install", action="store_true", help="install their packages, as root")
    parser.add_argument("--seccomp", default="default", help="profile (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print output of rows that fail")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows to run (default: all)")
    chosen = parser.parse_args()
    known = {program.name for program in PROGRAMS}
    if unknown := set(chosen.names) - known:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    rows = [program for program in PROGRAMS if not chosen.names or program.name in chosen.names]
    if chosen.install:
        install(rows)
    if not shutil.which("bwrap"):
        parser.error("bwrap is not installed: --install, or the package bubblewrap")
    width = max(len(program.name) for program in rows)
    worse = missing = 0
    for program in rows:
        if not is_there(program):
            missing += 1
            print(f"{program.name:{width}}  not installed: {program.packages}")
            continue
        outside, told_outside = in_bubblewrap(program)
        inside, told_inside = in_nsbox(program, chosen.seccomp)
        worse += outside and not inside
        words = ["pass" if passed else "FAIL" for passed in (outside, inside)]
        print(f"{program.name:{width}}  bubblewrap {words[0]}  nsbox {words[1]}", flush=True)
        for where, passed, told in (
            ("bubblewrap", outside, told_outside),
            ("nsbox", inside, told_inside),
        ):
            if chosen.show and not passed:
                print(
                    f"  {where}, expected {program.expected!r}:", *told.splitlines(), sep="\n    "
                )
    print(f"{len(rows)} rows, {missing} not installed, {worse} worse in nsbox than in bubblewrap")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
