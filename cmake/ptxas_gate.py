"""Runs the compiler command it is given, and fails where ptxas reports a C75xx: tensor-core instructions serialised."""

import re
import subprocess
import sys

done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(done.stdout)
if done.returncode == 0 and re.search(r"\(C75\d\d\)", done.stdout):
    sys.exit("gapkern: ptxas serialises the tensor cores' instructions (C75xx above)")
sys.exit(done.returncode)
