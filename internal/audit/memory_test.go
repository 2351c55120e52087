package audit

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// mostMiB is what a review may take, in MiB, whatever is in the log.
const mostMiB = 64

// asCommand lets the test be the command, in a process of its own: of memory, one process has a peak.
const asCommand = "ENI_GUARD_TEST_AUDIT"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) == "" {
		os.Exit(m.Run())
	}
	cmd := NewCommand()
	cmd.SetArgs(os.Args[1:])
	if err := cmd.ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// peak reviews what is written to it, and returns the most memory that took, in MiB, and what was printed.
func peak(t *testing.T, write func(io.Writer), lines func(string), args ...string) int {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	var messages strings.Builder
	cmd.Stderr = &messages
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	most := make(chan int64, 1)
	go func() { most <- mostMemory(cmd.Process.Pid, ended) }()
	go func() {
		buffered := bufio.NewWriterSize(in, 1<<20)
		write(buffered)
		// If the command has ended too early, that shows below.
		_ = buffered.Flush()
		_ = in.Close()
	}()
	read := bufio.NewReaderSize(out, 1<<16)
	for {
		text, err := read.ReadString('\n')
		lines(text)
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	close(ended)
	if err != nil {
		t.Fatalf("%v\n%s", err, messages.String())
	}
	return int(<-most >> 10)
}

// A log of nothing but removals, each of another pod, is the worst there is: there is a row for each.
func TestMemoryIsBoundedWhateverIsInTheLog(t *testing.T) {
	const removals = 30_000
	refused := recordedLine(t, `"force-delete.eni-guard.io/decision":"denied"`, `"verb":"delete"`)
	for _, format := range []string{"csv", "html"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			told := 0
			most := peak(t, func(out io.Writer) {
				for i := range removals {
					// A failed write shows as rows that are missing.
					_, _ = io.WriteString(out, another(refused, i))
				}
			}, func(line string) {
				if strings.Contains(line, "web-another-") {
					told++
				}
			}, "-o", format)
			t.Logf("%d MiB at most for %d removals in a log of %d MiB", most, removals, removals*len(refused)>>20)
			if most > mostMiB || most == 0 {
				t.Errorf("%d MiB", most)
			}
			if told < removals {
				t.Errorf("%d of %d removals are told", told, removals)
			}
		})
	}
}

// another is the same line about another pod, at another time.
func another(line string, i int) string {
	uid := fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
	line = auditID.ReplaceAllString(line, `"auditID":"`+uid+`"`)
	line = podUID.ReplaceAllString(line, `/pod-uid":"`+uid+`"`)
	line = received.ReplaceAllString(line, `"requestReceivedTimestamp":"`+time.Unix(1764032523, int64(i)*1_000_000).UTC().Format("2006-01-02T15:04:05.000000Z")+`"`)
	return strings.ReplaceAll(line, "/web-0", fmt.Sprintf("/web-another-%d", i))
}

var (
	auditID  = regexp.MustCompile(`"auditID":"[^"]*"`)
	podUID   = regexp.MustCompile(`/pod-uid":"[^"]*"`)
	received = regexp.MustCompile(`"requestReceivedTimestamp":"[^"]*"`)
)

// recordedLine is the first line of a recorded log that has all of the words.
func recordedLine(t *testing.T, words ...string) string {
	t.Helper()
	for line := range strings.Lines(recordedLog(t)) {
		found := true
		for _, word := range words {
			found = found && strings.Contains(line, word)
		}
		if found {
			return line
		}
	}
	t.Fatalf("no line has %q", words)
	return ""
}

// The answer to the delete of a collection is the longest line there is.
func TestMemoryIsBoundedWithTheLongestLines(t *testing.T) {
	line := recordedLine(t, `"verb":"deletecollection"`, `"force-delete.eni-guard.io/pod.`)
	first := strings.Index(line, `"items":[`) + len(`"items":[`)
	_, items, _ := strings.Cut(line[first:], `{"metadata"`)
	item, _, _ := strings.Cut(items, `},{"metadata"`)
	pods := strings.Repeat(`{"metadata"`+item+`},`, (15<<20)/len(item))
	t.Logf("a line of %d MiB", (len(line)+len(pods))>>20)
	told := 0
	most := peak(t, func(out io.Writer) {
		for range 4 {
			_, _ = io.WriteString(out, line[:first]+pods+line[first:])
		}
	}, func(text string) {
		if strings.Contains(text, "collection") {
			told++
		}
	}, "-o", "csv", "--strict")
	t.Logf("%d MiB at most, %d rows", most, told)
	if most > mostMiB || most == 0 || told == 0 {
		t.Errorf("%d MiB, %d rows", most, told)
	}
}
