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
from nsbox.values.config import ProfileChoice


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
    maps_widely: bool = False
    """Whether it wants terabytes of addresses, which User-Mode Linux has not."""
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
    # What goes by the errno of a refused call, or by calls that once were refused.
    Program(
        name="coreutils-files",
        packages="coreutils sed perl-base",
        command="""
echo a > a; chmod 640 a; mkdir d; echo x > d/x; ln -s x d/l
cp -p a b; cp -a a c; cp -a d e; cp --preserve=all a f; cp -a /usr/bin/env g; cp -rp d h
cp --reflink=auto a i; cp --sparse=always a i; cp -l a j; cp -s $PWD/a k; cp -u a b; cp -b a b
install a l; install -m 755 -p a m; install -d n/o; install -C a q
install -o $(id -u) -g $(id -g) a r
mv l /dev/shm/l; mv /dev/shm/l l; cp -a d /dev/shm/d; mv /dev/shm/d d2
sed -i s/a/b/ a; sed -i.bak s/b/c/ a; perl -pi -e s/c/d/ a; sort -o a a
touch -r a b; touch -d yesterday b; truncate -s 1M t; fallocate -l 1M t2; shred -u t2
dd if=/dev/zero of=t3 bs=64k count=1 conv=fsync status=none; sync t3; mkfifo ff; mknod fg p
mktemp -d > /dev/null; chmod 1777 d; chown $(id -u):$(id -g) a; chgrp $(id -g) a
chown -h $(id -u) d/l; ls -laZ d > /dev/null; ls -la /proc/self > /dev/null; stat -f a > /dev/null
df > /dev/null; df . > /dev/null; du -s . > /dev/null; link a aa; unlink aa; realpath d/l
split -n 2 t3; csplit -s t3 1; rm -r d e n; stat -c '%a %n' a g m | head -n 1; cat a d2/x
""",
        expected="/tmp/d/x\n640 a\nd\nx",
        programs="cp install mv sed perl",
        small=True,
    ),
    Program(
        name="coreutils-text",
        packages="coreutils",
        command="""
seq 3 > s; printf '1 a\\n2 b\\n' > j; printf '1 x\\n2 y\\n' > k
for one in cat tac nl od base32 base64 'basenc --z85' fmt pr fold head tail wc sum cksum b2sum \\
    md5sum sha1sum sha224sum sha256sum sha384sum sha512sum sort shuf uniq ptx 'cut -c1' \\
    'tr 1 2' expand unexpand numfmt 'paste - -' 'tee /dev/null' 'sort --parallel=2 -S 1M'; do
    printf 'abc1' | $one > /dev/null 2> e || case $one in numfmt) ;; *) echo "$one"; cat e ;; esac
done
join j k; comm s s | head -n 1; echo a b | tsort; seq 3 | tee x1 > x2; cmp x1 x2
yes | head -n 1; factor 12; expr 1 + 1; basename /a/b; dirname /a/b; pathchk a; printenv HOME
dircolors -b > /dev/null; date > /dev/null; arch > /dev/null; uname -a > /dev/null
nproc > /dev/null; hostid > /dev/null; tty || true; timeout 5 true; env -i true
nohup true; stdbuf -o0 true; id -u; users; who; sleep 0; test 1 -eq 1; [ 1 = 1 ]
! false; kill -l > /dev/null; truncate -s 0 x1
""",
        expected="1 a x\n2 b y\n\t\t1\na\nb\ny\n12: 2 2 3\n2\nb\n/a\n/tmp\nnot a tty\n1000",
        programs="sort join",
        small=True,
    ),
    Program(
        name="tar",
        packages="tar",
        command="""
mkdir d n; echo x > d/x; ln -s x d/l; ln d/x d/y; mkfifo d/f
tar cf t.tar d; tar xf t.tar -C n; tar xpf t.tar --same-owner --numeric-owner -C n
tar --xattrs --selinux -cf x.tar d; tar --xattrs --selinux -xf x.tar -C n
tar --xattrs --xattrs-include='*' -xpf x.tar -C n; tar -cSf - d | tar -xf - -C n; cat n/d/l n/d/y
""",
        expected="x\nx",
        small=True,
    ),
    Program(
        name="rsync",
        packages="rsync",
        command="""
mkdir d; echo x > d/x; ln -s x d/l; ln d/x d/y
rsync -a d n/; rsync -aHAX d m/; rsync -a --fsync --preallocate d o/; rsync -aHAX --delete d m/
cat n/d/l m/d/y o/d/x
""",
        expected="x\nx\nx",
    ),
    Program(
        name="git",
        packages="git",
        command="""
git init -q r; cd r; git config user.email a@b; git config user.name a; echo x > x; git add x
git commit -qm m; git gc -q; git fsck --no-progress; git clone -q . ../c; git worktree add -q ../w
git bundle create -q ../b HEAD; git archive HEAD | tar t; echo y >> x
git stash -q; git stash pop -q
git diff --stat | tail -n 1
""",
        expected="x\n 1 file changed, 1 insertion\\(\\+\\)",
        small=True,
    ),
    Program(
        name="make-install",
        packages="make gcc libc6-dev",
        command="""
cat > Makefile <<'END'
all: a b
%: %.c
	cc -o $@ $<
install: all
	install -d $(DESTDIR)/bin $(DESTDIR)/share
	install -m 755 a b $(DESTDIR)/bin
	install -s -m 755 a $(DESTDIR)/bin/stripped
	cp -a a.c $(DESTDIR)/share
END
echo 'int main(void) { return 0; }' > a.c; cp -p a.c b.c
make -s -j4; make -s install DESTDIR=/tmp/i; make -s install DESTDIR=/dev/shm/i
i/bin/stripped; ls /dev/shm/i/bin /dev/shm/i/share
""",
        expected="/dev/shm/i/bin:\na\nb\nstripped\n\n/dev/shm/i/share:\na.c",
        programs="make gcc",
        small=True,
    ),
    *(
        Program(
            name=f"sanitizer-{name}",
            packages="gcc libc6-dev",
            command=f"""
cat > a.c <<'END'
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
static void *get(void *size) {{ return malloc(*(int *)size); }}
int main(void) {{
    pthread_t thread;
    int size = 10;
    void *got;
    pthread_create(&thread, 0, get, &size);
    pthread_join(thread, &got);
    free(got);
    puts("correct");
    return 0;
}}
END
gcc -g -fsanitize={name} -o a a.c -lpthread; ./a
""",
            expected="correct",
            programs="gcc",
            small=True,
            strict=name in ("undefined", "thread"),
            maps_widely=True,
        )
        for name in ("address", "leak", "undefined", "thread")
    ),
    Program(
        name="leaks-are-told",
        packages="gcc libc6-dev",
        command="""
echo '#include <stdlib.h>
int main(void) { return malloc(1234) == 0; }' > a.c
gcc -O0 -fsanitize=address -o a a.c; ./a 2>&1 | grep SUMMARY
""",
        expected=r"SUMMARY: AddressSanitizer: 1234 byte\(s\) leaked in 1 allocation\(s\)\.",
        programs="gcc",
        small=True,
        strict=False,
        maps_widely=True,
    ),
    Program(
        name="openmp",
        packages="gcc libc6-dev",
        command="""
echo '#include <stdio.h>
int main(void) {
    int n = 0;
    #pragma omp parallel num_threads(2) reduction(+:n)
    n += 1;
    printf("%d\\\\n", n);
}' > a.c
gcc -fopenmp -o a a.c; OMP_PROC_BIND=true OMP_DYNAMIC=false ./a
""",
        expected="2",
        programs="gcc",
        small=True,
    ),
    Program(
        name="musl",
        packages="musl-tools",
        command=r"""
cat > a.c <<'END'
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
extern char **environ;
static void *same(void *argument) { return argument; }
int main(void) {
    pthread_t thread;
    pid_t pid;
    int status, failed = 0;
    struct rlimit limit;
    char *words[] = {"true", 0};
    failed |= pthread_create(&thread, 0, same, 0) || pthread_join(thread, 0);
    failed |= posix_spawn(&pid, "/bin/true", 0, 0, words, environ);
    failed |= waitpid(pid, &status, 0) != pid || status;
    failed |= fchmodat(AT_FDCWD, "a.c", 0600, AT_SYMLINK_NOFOLLOW);
    failed |= faccessat(AT_FDCWD, "/tmp", R_OK, AT_EACCESS);
    failed |= getrlimit(RLIMIT_NOFILE, &limit) || setrlimit(RLIMIT_NOFILE, &limit);
    printf("%d\n", failed);
}
END
musl-gcc -static -o a a.c; ./a
""",
        expected="0",
    ),
    Program(
        name="ip",
        packages="iproute2",
        command="ip -br a; ip route",
        expected=r"lo +UNKNOWN +127\.0\.0\.1/8 .*",
        small=True,
    ),
    Program(
        name="scheduling",
        packages="util-linux",
        command="""
nice -n 5 nice; ionice -c3 ionice; ionice -c 2 -n 7 -p $$; ionice -p $$
prlimit --pid $$ > /dev/null; prlimit --nofile=64:64 sh -c 'ulimit -n'; taskset -c 0 true
taskset -p $$ > /dev/null; chrt -p $$ > /dev/null; chrt -b 0 true; chrt -i 0 true
renice -n 6 -p $$ > /dev/null; setarch -R true
""",
        expected="5\nidle\nbest-effort: prio 7\n64",
        programs="ionice prlimit taskset chrt setarch",
        small=True,
        strict=False,
    ),
    Program(
        name="queues-and-signals",
        packages="util-linux python3",
        command="""
ipcmk -Q > /dev/null; ipcmk -M 10 > /dev/null; ipcmk -S 1 > /dev/null; ipcs > /dev/null
/usr/bin/python3 -c '
import ctypes, os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
ctypes.CDLL(None).sigqueue(os.getpid(), signal.SIGUSR1, 42)
print(signal.sigwaitinfo([signal.SIGUSR1]).si_signo, os.sched_rr_get_interval(0) >= 0)'
""",
        expected="10 True",
        programs="ipcmk python3",
        small=True,
        strict=False,
    ),
)


def in_nsbox(program: Program, profile: ProfileChoice = "default") -> tuple[bool, str]:
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
