package auditlog

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Problem is a line, or a file, that could not be read.
type Problem struct {
	File string `json:"file"`
	// Line counts from 1; 0 means the file.
	Line int64  `json:"line,omitempty"`
	What string `json:"problem"`
}

func (p Problem) String() string {
	if p.Line == 0 {
		return p.File + " " + p.What
	}
	return fmt.Sprintf("%s: line %d %s", p.File, p.Line, p.What)
}

// maxProblems is how many lines of one file are named that could not be read. All are counted; what ended a file is always named.
const maxProblems = 5

// Summary says what was read.
type Summary struct {
	// From and To are the times of the earliest and the latest of the first and the last lines of all files, and of what was parsed.
	From  time.Time `json:"from,omitzero"`
	To    time.Time `json:"to,omitzero"`
	Files int       `json:"files"`
	Lines int64     `json:"lines"`
	// Bytes are those of the lines, unpacked.
	Bytes int64 `json:"bytes"`
	// Parsed are the events that were not left out before parsing.
	Parsed int64 `json:"parsed"`
	// ProblemCount counts all problems; Problems are the first of each file, in the order of files and lines.
	ProblemCount int64     `json:"problemCount"`
	Problems     []Problem `json:"problems,omitempty"`
	// Unread counts the files that are no audit log, or could not be read to their end.
	Unread int `json:"unread,omitempty"`
}

// Reader reads logs.
type Reader struct {
	Selection Selection
	// Each is given every event that may matter, in the order of its file; it is called for one event at a time.
	Each func(*Event)
	// Strict makes the first problem an error.
	Strict bool
	// EachProblem, unless it is nil, is given every problem as it is found; it is called for one at a time.
	EachProblem func(Problem)
	// done counts the bytes that were read, as they are on the disk.
	done atomic.Int64
	mu   sync.Mutex
}

// Done is how many bytes were read of all sources so far, as they are on the disk. It may be asked at any time.
func (r *Reader) Done() int64 { return r.done.Load() }

// Read reads the sources, as many at a time as there are processors. Lines that cannot be read are in the summary, and so are files that turn
// out to be unreadable later; an error means that it was cancelled, or that a problem was found with Strict.
func (r *Reader) Read(ctx context.Context, sources []Source) (Summary, error) {
	parts := make([]Summary, len(sources))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, source := range sources {
		group.Go(func() error {
			f := &fileReader{Reader: r, source: source, part: &parts[i]}
			return f.read(ctx)
		})
	}
	err := group.Wait()
	total := Summary{Files: len(sources)}
	for _, part := range parts {
		total.add(part)
	}
	slices.SortStableFunc(total.Problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
	return total, err
}

func (s *Summary) add(part Summary) {
	if !part.From.IsZero() {
		s.cover(part.From)
		s.cover(part.To)
	}
	s.Lines += part.Lines
	s.Bytes += part.Bytes
	s.Parsed += part.Parsed
	s.ProblemCount += part.ProblemCount
	s.Unread += part.Unread
	s.Problems = append(s.Problems, part.Problems...)
}

// cover extends the time that was read.
func (s *Summary) cover(at time.Time) {
	if s.From.IsZero() || at.Before(s.From) {
		s.From = at
	}
	if at.After(s.To) {
		s.To = at
	}
}

// fileReader reads one source.
type fileReader struct {
	*Reader
	source Source
	part   *Summary
	// events says that the file has an audit event.
	events bool
	// last is the end of the last line, up to lastSize.
	last []byte
}

// lastSize is how much of the end of a line has its time, in bytes: only annotations may stand behind it.
const lastSize = 4 << 10

func (f *fileReader) read(ctx context.Context) error {
	file, err := f.source.open()
	if err != nil {
		return f.unread(0, "cannot be read: "+err.Error())
	}
	defer file.Close()
	from := io.Reader(&counted{from: file, done: &f.done})
	if f.source.Size < 0 {
		from = &interruptible{ctx: ctx, from: from}
	}
	unpacked, closeIt, err := decompress(from)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return f.unread(0, err.Error())
	}
	defer closeIt()
	if err := f.readLines(ctx, newLines(unpacked)); err != nil {
		return err
	}
	if !f.events && f.part.Lines > 0 {
		return f.unread(0, fmt.Sprintf("is not an audit log: none of its %d lines has an event", f.part.Lines))
	}
	return nil
}

func (f *fileReader) readLines(ctx context.Context, from *lines) error {
	defer from.close()
	defer func() {
		f.time(f.last)
		f.part.Lines, f.part.Bytes = from.count, from.size
	}()
	first := true
	for ctx.Err() == nil {
		p, err := from.next()
		if errors.Is(err, io.EOF) {
			f.part.Lines = from.count
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return f.unread(from.count+1, "and what follows cannot be read: "+err.Error())
		}
		switch {
		case p.unended:
			err = problem("is cut off: its container runtime has taken it apart, and its end is missing")
		case p.tooLong:
			err = problem(fmt.Sprintf("was not read: it is longer than %d MiB%s", maxLine>>20, subject(p.text)))
		default:
			if first {
				f.time(p.text)
				first = false
			}
			f.last = append(f.last[:0], p.text[max(0, len(p.text)-lastSize):]...)
			err = f.line(p.text)
		}
		if err != nil {
			if err := f.problem(p.line, err.Error()); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// received is a time as it stands in an event, which may have spaces, or be a text in something else, with its quotes escaped.
var received = regexp.MustCompile(`^requestReceivedTimestamp\\*" *: *\\*"([^"\\]+)`)

// time reads the time of a line that may not be parsed.
func (f *fileReader) time(text []byte) {
	start := max(0, bytes.LastIndex(text, []byte("requestReceivedTimestamp")))
	if value := received.FindSubmatch(text[start:]); value != nil {
		if at, err := time.Parse(time.RFC3339Nano, string(value[1])); err == nil {
			f.part.cover(at)
		}
	}
}

// subject says what the head of a line is about, in words that fit at the end of a problem.
func subject(head []byte) string {
	verb := valueOf(head, verbKey)
	address := valueOf(head, []byte(`"requestURI":"`))
	if len(verb) == 0 || len(address) == 0 {
		return ""
	}
	return fmt.Sprintf(". It is about %s %.200s, and pods that are named only there are missing here", verb, address)
}

// line reads one line. A line that cannot matter is not parsed, but only if it looks whole: it begins and ends as an event does, and
// no second one begins in the middle, as happens where a log was cut off and written on.
func (f *fileReader) line(text []byte) error {
	text, other := unwrap(bytes.TrimSpace(text))
	if len(text) == 0 || other {
		return nil
	}
	if bytes.HasPrefix(text, canonicalHead) {
		// If there are more than two, those in the middle are cut off, too.
		if bytes.Contains(text[1:], canonicalHead) {
			f.events = true
			if err := f.line(text[bytes.LastIndex(text, canonicalHead):]); err != nil {
				return err
			}
			return problem("is cut off, and another event follows in it; that one was read")
		}
		if text[len(text)-1] == '}' && !f.Selection.mayMatter(text) {
			f.events = true
			return nil
		}
	} else if text[0] == '{' && text[len(text)-1] == '}' && bytes.Contains(text, quotedVersion) && !f.Selection.mayMatterAnyhow(text) {
		f.events = true
		return nil
	}
	return parse(text, f.event, f.item)
}

// logLine is how lines of the API server's own log begin (k8s.io/klog), which are beside events where both go to one place.
var logLine = regexp.MustCompile(`^[IWEF][0-9]{4} [0-9:.]+ +[0-9]+ [^\]]*\] ?`)

// prefixSize is how far from the start of a line an event is looked for that something else has written a prefix to, in bytes.
const prefixSize = 512

// unwrap takes away what a logger has written before an event; other says that the line is one of a program's own log.
func unwrap(text []byte) (event []byte, other bool) {
	if len(text) == 0 || text[0] == '{' {
		return text, false
	}
	if at := bytes.Index(text[:min(len(text), prefixSize)], eventHead); at >= 0 {
		return text[at:], false
	}
	if head := logLine.Find(text); head != nil {
		rest := text[len(head):]
		return rest, !bytes.HasPrefix(rest, []byte("{"))
	}
	return text, false
}

// item reads an event of an EventList, which has neither kind nor version of its own.
func (f *fileReader) item(text []byte) error {
	f.events = true
	// An item may have a version of its own.
	if !f.Selection.mayMatterAnyhow(text) && (!bytes.Contains(text, []byte(groupPrefix)) || bytes.Contains(text, quotedVersion)) {
		return nil
	}
	var l line
	if err := json.Unmarshal(text, &l); err != nil {
		return problem(fmt.Sprintf("has an item that is not an audit event: %.200s", err))
	}
	if l.APIVersion != "" && l.APIVersion != knownVersion || l.Kind != "" && l.Kind != "Event" {
		return problem(fmt.Sprintf("has an item that is %q of %q, which is not known; an Event of %s is", l.Kind, l.APIVersion, knownVersion))
	}
	f.event(l.event())
	return nil
}

func (f *fileReader) event(e *Event) {
	f.events = true
	f.part.Parsed++
	if !e.Received.IsZero() {
		f.part.cover(e.Received)
	}
	if e.Stage != StageResponseComplete && e.Stage != StagePanic {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.Each(e)
}

// unread is a problem behind which nothing was read. It is named however many lines were before it.
func (f *fileReader) unread(line int64, what string) error {
	f.part.Unread++
	return f.tell(Problem{File: f.source.Name, Line: line, What: what}, true)
}

func (f *fileReader) problem(line int64, what string) error {
	return f.tell(Problem{File: f.source.Name, Line: line, What: what}, len(f.part.Problems) < maxProblems)
}

func (f *fileReader) tell(p Problem, named bool) error {
	f.part.ProblemCount++
	if named {
		f.part.Problems = append(f.part.Problems, p)
	}
	if f.Strict {
		return errors.New(p.String())
	}
	if f.EachProblem != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.EachProblem(p)
	}
	return nil
}

// interruptible reads from a pipe, on which nothing may come for long, until the context ends.
type interruptible struct {
	ctx  context.Context
	from io.Reader
	// buffer is read to while nobody waits; left is what of it was not handed over yet.
	buffer, left []byte
	results      chan result
}

type result struct {
	n   int
	err error
}

func (r *interruptible) Read(p []byte) (int, error) {
	if len(r.left) > 0 {
		n := copy(p, r.left)
		r.left = r.left[n:]
		return n, nil
	}
	if r.results == nil {
		r.buffer, r.results = make([]byte, 64<<10), make(chan result, 1)
	}
	go func() {
		n, err := r.from.Read(r.buffer)
		r.results <- result{n, err}
	}()
	select {
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	case got := <-r.results:
		n := copy(p, r.buffer[:got.n])
		r.left = r.buffer[n:got.n]
		return n, got.err
	}
}

// counted counts what is read.
type counted struct {
	from io.Reader
	done *atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	c.done.Add(int64(n))
	return n, err
}
