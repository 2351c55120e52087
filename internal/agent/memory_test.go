package agent

import (
	"testing"

	"github.com/prometheus/procfs"
)

// The pages of the file go, and the program goes on.
func TestTheStartIsReleased(t *testing.T) {
	resident := func() uint64 {
		self, err := procfs.Self()
		if err != nil {
			t.Fatal(err)
		}
		status, err := self.NewStatus()
		if err != nil {
			t.Fatal(err)
		}
		return status.RssFile
	}
	before := resident()
	if err := releaseStart(); err != nil {
		t.Fatal(err)
	}
	if after := resident(); after >= before {
		t.Errorf("%d bytes of files were resident, and %d are", before, after)
	}
}
