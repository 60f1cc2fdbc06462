"""What the work is done on: files of unwritten extents, files with data, a slow file, a kernel loop device."""

import os
import shutil
import subprocess
import sys
import time

GIB = 1 << 30
MIB = 1 << 20
SLOW_SIZE = 128 * MIB


class Files:
    def __init__(self, work, examples):
        self.work = work
        self.examples = examples
        self.mounts = {}
        self.loops = {}
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)

    def path(self, name):
        return os.path.join(self.work, name)

    def unwritten(self, name="unwritten", size=GIB):
        """A file of unwritten extents: reading it costs software only, no device time."""
        path = self.path(name)
        if not os.path.exists(path):
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                os.fsync(file.fileno())
        return path

    def fresh(self):
        """The same for a run that writes, which changes the extents: as new for each, in the same place on the disk.

        Not by a new file: filesystems mounted with `discard` would discard the old one's blocks under the next run.
        """
        path = self.unwritten("fresh")
        done = subprocess.run(["fallocate", "--zero-range", "--length", str(GIB), path], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit("%s: its extents cannot be made unwritten again (ext4 and xfs can): %s" % (path, done.stdout.strip()))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return path

    def written(self):
        path = self.path("written")
        if not os.path.exists(path):
            block = os.urandom(MIB)
            with open(path, "wb") as file:
                for _ in range(GIB // MIB):
                    file.write(block)
                os.fsync(file.fileno())
        return path

    def slow(self):
        """A file whose every read and write blocks its caller for a millisecond more, and costs little else (tests/latencyfs.rs)."""
        return self.mounted("latencyfs", "1000")

    def sick(self):
        """The same of a filesystem that can be made to do worse (tests/slowfs), for more processor time."""
        if "slowfs" not in self.mounts:
            self.faults("latency_us=1000")
        return self.mounted("slowfs")

    def mounted(self, program, *args):
        """The file of a filesystem of ours on a file in memory."""
        if program not in self.mounts:
            backing = self.backing(program)
            with open(backing, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, SLOW_SIZE)
            mount = self.path(program)
            os.makedirs(mount)
            # Its server would be another machine: it must not take the reactor's processor.
            command = ["taskset", "-c", "1", os.path.join(self.examples, program), backing, mount, *args]
            child = subprocess.Popen(command)
            self.mounts[program] = (child, mount)
            deadline = time.monotonic() + 20
            while not os.path.exists(os.path.join(mount, "image")):
                if child.poll() is not None or time.monotonic() > deadline:
                    sys.exit("%s does not come up on %s; is /dev/fuse there, and may this user mount?" % (program, mount))
                time.sleep(0.01)
        return os.path.join(self.mounts[program][1], "image")

    @staticmethod
    def backing(program):
        return "/dev/shm/lloop-bench-%d-%s" % (os.getpid(), program)

    def faults(self, words):
        """What is wrong with the sick file from now on, in the words of tests/slowfs/faults.rs."""
        path = self.backing("slowfs") + ".faults"
        with open(path + ".new", "w") as file:
            file.write(words)
        os.rename(path + ".new", path)

    def loop(self, path):
        """The kernel's loop device on a file, with direct I/O."""
        inode = os.stat(path).st_ino
        if self.loops.get(path, (None, None))[1] != inode:
            self.drop_loop(path)
            done = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", path], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                sys.exit("losetup refuses %s: %s" % (path, done.stdout.strip()))
            self.loops[path] = (done.stdout.strip(), inode)
        return self.loops[path][0]

    def drop_loop(self, path):
        device, _ = self.loops.pop(path, (None, None))
        if device:
            subprocess.run(["losetup", "--detach", device], check=False)

    def drop(self, path):
        self.drop_loop(path)
        if os.path.exists(path):
            os.unlink(path)

    def close(self):
        for path in list(self.loops):
            self.drop_loop(path)
        if "slowfs" in self.mounts:
            self.faults("")
        for program, (child, mount) in self.mounts.items():
            subprocess.run(["umount", "-l", mount], check=False)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            for path in (self.backing(program), self.backing(program) + ".faults"):
                if os.path.exists(path):
                    os.unlink(path)
        shutil.rmtree(self.work, ignore_errors=True)
