package agent

import (
	"errors"
	"os"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// startTime is after how long everything has been done that is done once: packages initialised, the pods listed, everything looked at.
const startTime = time.Minute

// heapGrowth is by how much the heap may grow before garbage is collected, in percent of what is alive (GOGC). There is little garbage
// at rest, and to collect it twice as often as Go does by default is cheap; the agent is on every node.
const heapGrowth = 50

// releaseStart gives back the memory that only the start of the program needed: the pages of its file, code and constants, that
// the initialisation of all packages has touched, above all the types of the whole Kubernetes API, and the first talk with the API
// server. That is most of what is resident. What is used again comes back from the page cache.
func releaseStart() error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	self, err := procfs.Self()
	if err != nil {
		return err
	}
	mappings, err := self.ProcMaps()
	if err != nil {
		return err
	}
	for _, m := range mappings {
		// Never what can be written: that would be read from the file again.
		if m.Pathname != program || m.Perms.Write {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.StartAddr, m.EndAddr-m.StartAddr, unix.MADV_DONTNEED); errno != 0 {
			err = errors.Join(err, errno)
		}
	}
	return err
}
