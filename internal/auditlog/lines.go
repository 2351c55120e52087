package auditlog

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"
)

const (
	// maxLine bounds a line, in bytes. An event has at most two objects, of at most 1.5 MiB each as etcd keeps them, except
	// that of a collection delete, which lists every pod.
	maxLine = 16 << 20
	// readSize is how much is read at once.
	readSize = 256 << 10
	// headSize is how much of a line that is too long is kept, to say what it was about.
	headSize = 4 << 10
	// longLine is above which there is one at a time, in bytes, however many files are read.
	longLine = 1 << 20
)

// oneLongLine is the memory for it, which is used again and again: what the garbage collector has not found yet would be there twice.
var oneLongLine struct {
	sync.Mutex

	memory []byte
}

// piece is a line without its end, or a value of JSON that is spread over lines. It is valid until the next.
type piece struct {
	text []byte
	// line is the number of the line that it begins in, from 1.
	line int64
	// tooLong says that only the head of it is here, unended that its end is missing.
	tooLong, unended bool
}

// lines takes a log apart. Its memory is bounded, whatever is in the log.
type lines struct {
	from *bufio.Reader
	// count and size are what was read so far, in lines and bytes.
	count, size int64
	begun       bool
	// spread says that values do not end with lines.
	spread bool
	// line is one that does not fit into the buffer; parts are lines that a container runtime has taken apart, by the stream they are from.
	line  gathered
	parts map[string]*gathered
}

func newLines(from io.Reader) *lines {
	l := &lines{from: bufio.NewReaderSize(from, readSize), parts: map[string]*gathered{}}
	lock := &longLock{}
	l.line.lock = lock
	for _, stream := range []string{"stdout", "stderr"} {
		l.parts[stream] = &gathered{lock: lock}
	}
	return l
}

// close lets others read long lines.
func (l *lines) close() {
	l.line.reset()
	for _, part := range l.parts {
		part.reset()
	}
}

// next returns the next piece, and io.EOF after the last.
func (l *lines) next() (piece, error) {
	if !l.begun {
		l.begun = true
		// Peek fails where there is less; that shows when it is read.
		if head, _ := l.from.Peek(3); bytes.Equal(head, []byte("\xef\xbb\xbf")) {
			_, _ = l.from.Discard(3)
		}
		// A short log may have fewer bytes.
		head, _ := l.from.Peek(2)
		l.spread = len(head) == 2 && (head[0] == '[' && bytes.IndexByte([]byte(" \t\r\n{]"), head[1]) >= 0 || head[0] == '{' && (head[1] == '\r' || head[1] == '\n'))
	}
	if l.spread {
		return l.value()
	}
	for {
		p, err := l.physical()
		if errors.Is(err, io.EOF) {
			return l.unended()
		}
		if err != nil {
			return p, err
		}
		stream, part, text := unwrapCRI(p.text)
		if p.text = text; stream == "" || p.tooLong {
			return p, nil
		}
		parts := l.parts[stream]
		if parts.ended {
			parts.reset()
		}
		if !part && len(parts.text) == 0 {
			return p, nil
		}
		if parts.add(text, p.line); !part {
			parts.ended = true
			return parts.piece(), nil
		}
	}
}

// unended returns a line of which a container runtime has not written the last part, once.
func (l *lines) unended() (piece, error) {
	for _, part := range l.parts {
		if part.size > 0 && !part.ended {
			part.ended = true
			p := part.piece()
			p.unended = true
			return p, nil
		}
	}
	return piece{}, io.EOF
}

// physical returns a line as it stands in the file.
func (l *lines) physical() (piece, error) {
	l.line.reset()
	text, err := l.from.ReadSlice('\n')
	if len(text) > 0 {
		l.count++
		l.size += int64(len(text))
	}
	p := piece{text: text, line: l.count}
	if errors.Is(err, bufio.ErrBufferFull) {
		l.line.add(text, l.count)
		for errors.Is(err, bufio.ErrBufferFull) {
			text, err = l.from.ReadSlice('\n')
			l.size += int64(len(text))
			l.line.add(text, l.count)
		}
		p = l.line.piece()
	}
	if len(p.text) == 0 || err != nil && !errors.Is(err, io.EOF) {
		return p, err
	}
	p.text = bytes.TrimSuffix(bytes.TrimSuffix(p.text, []byte("\n")), []byte("\r"))
	return p, nil
}

// value returns the next object of JSON, wherever its lines end: of a list, or of one that was printed for people. What is between objects is
// left out, and where something else stands, the rest of its line is returned.
func (l *lines) value() (piece, error) {
	l.line.reset()
	depth, inText, escaped, begun, broken := 0, false, false, false, false
	for {
		if _, err := l.from.Peek(1); err != nil {
			if errors.Is(err, io.EOF) && begun {
				return l.line.piece(), nil
			}
			return piece{}, err
		}
		// What is there already.
		chunk, _ := l.from.Peek(l.from.Buffered())
		if l.count == 0 {
			l.count = 1
		}
		start, end := 0, -1
		first := l.count
		for i, c := range chunk {
			if c == '\n' {
				l.count++
			}
			switch {
			case !begun && bytes.IndexByte([]byte(" \t\r\n,[]"), c) >= 0:
				start = i + 1
				first = l.count
				continue
			case !begun:
				begun, broken = true, c != '{'
			}
			switch {
			case broken:
				if c == '\n' {
					end = i + 1
				}
			case escaped:
				escaped = false
			case inText:
				escaped, inText = c == '\\', c != '"'
			case c == '"':
				inText = true
			case c == '{' || c == '[':
				depth++
			case c == '}' || c == ']':
				if depth--; depth == 0 {
					end = i + 1
				}
			}
			if end >= 0 {
				break
			}
		}
		used := end
		if end < 0 {
			used = len(chunk)
		}
		l.line.add(chunk[start:used], first)
		l.size += int64(used)
		_, _ = l.from.Discard(used)
		if end >= 0 {
			return l.line.piece(), nil
		}
	}
}

// unwrapCRI takes away what a container runtime writes before each line of a log (k8s.io/cri-api: TIME STREAM TAGS TEXT), or `kubectl logs
// --timestamps` (TIME TEXT). part says that the line goes on in the next one of its stream.
func unwrapCRI(text []byte) (stream string, part bool, rest []byte) {
	// 2006-01-02T15:04:05Z
	if len(text) < 21 || text[4] != '-' || text[7] != '-' || text[10] != 'T' || text[13] != ':' {
		return "", false, text
	}
	_, rest, found := bytes.Cut(text, []byte(" "))
	if !found {
		return "", false, text
	}
	for _, stream := range []string{"stdout", "stderr"} {
		after, is := bytes.CutPrefix(rest, []byte(stream+" "))
		tags, content, found := bytes.Cut(after, []byte(" "))
		if is && found && len(tags) > 0 && (tags[0] == 'P' || tags[0] == 'F') {
			return stream, tags[0] == 'P', content
		}
	}
	return "", false, rest
}

// gathered puts together a line that is read in parts.
type gathered struct {
	lock  *longLock
	text  []byte
	line  int64
	size  int
	ended bool
}

// add appends to the line that begins in this one.
func (g *gathered) add(part []byte, line int64) {
	if g.size == 0 {
		g.line = line
	}
	if g.size += len(part); g.size > maxLine {
		part = part[:min(len(part), max(0, headSize-len(g.text)))]
		head := append(bytes.Clone(g.text[:min(len(g.text), headSize)]), part...)
		g.lock.release(g)
		g.text = head
		return
	}
	if len(g.text)+len(part) > longLine {
		g.lock.take(g)
	}
	g.text = append(g.text, part...)
}

func (g *gathered) piece() piece { return piece{text: g.text, line: g.line, tooLong: g.size > maxLine} }

func (g *gathered) reset() {
	g.lock.release(g)
	g.size, g.ended, g.text = 0, false, g.text[:0]
}

// longLock is the right of one file to have a long line in memory.
type longLock struct{ holders []*gathered }

func (l *longLock) take(g *gathered) {
	if slices.Contains(l.holders, g) {
		return
	}
	if len(l.holders) == 0 {
		oneLongLine.Lock()
		if oneLongLine.memory == nil {
			oneLongLine.memory = make([]byte, 0, maxLine)
		}
		g.text = append(oneLongLine.memory, g.text...)
	}
	l.holders = append(l.holders, g)
}

func (l *longLock) release(g *gathered) {
	at := slices.Index(l.holders, g)
	if at < 0 {
		return
	}
	// It may be in the memory that the next one gets.
	g.text = nil
	if l.holders = slices.Delete(l.holders, at, at+1); len(l.holders) == 0 {
		oneLongLine.Unlock()
	}
}
