package audit

import (
	"context"
	"io"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/eni-guard/eni-guard/internal/auditlog"
)

// progressEvery is how often the progress is drawn anew.
const progressEvery = 200 * time.Millisecond

// readShown reads, and shows on a terminal how far it is, how fast, and how long it will take. Of a pipe the size is not known: there it shows how
// much was read, and how fast.
func readShown(ctx context.Context, reader *auditlog.Reader, sources []auditlog.Source, messages io.Writer) (auditlog.Summary, error) {
	var size int64
	for _, source := range sources {
		if source.Size < 0 || size < 0 {
			size = -1
			continue
		}
		size += source.Size
	}
	// There is nothing to see of nothing.
	if size == 0 {
		return reader.Read(ctx, sources)
	}
	if !isTerminal(messages) {
		return reader.Read(ctx, sources)
	}
	bar := progressbar.NewOptions64(size,
		progressbar.OptionSetWriter(messages), progressbar.OptionSetDescription("reading"), progressbar.OptionSetWidth(20),
		progressbar.OptionShowBytes(true), progressbar.OptionShowCount(), progressbar.OptionUseIECUnits(true), progressbar.OptionSetPredictTime(true),
		progressbar.OptionClearOnFinish())
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				// A terminal that cannot be written to says nothing about the log.
				at := reader.Done()
				if size > 0 {
					at = min(at, size-1)
				}
				_ = bar.Set64(at)
			}
		}
	}()
	read, err := reader.Read(ctx, sources)
	close(done)
	<-ended
	_ = bar.Clear()
	return read, err
}
