package audit

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/auditlog"
)

// terminal is a real one of a width: what is written to user shows at screen.
func terminal(t *testing.T, width uint16) (user, screen *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	control, err := screen.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	number := 0
	var failed error
	err = control.Control(func(fd uintptr) {
		if failed = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); failed == nil {
			number, failed = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
		if failed == nil {
			failed = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: width})
		}
	})
	if err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	if user, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { user.Close() })
	return user, screen
}

func TestOnATerminalTheTableFitsAndHasColours(t *testing.T) {
	t.Setenv("NO_COLOR", "")
	user, screen := terminal(t, 90)
	shown := make(chan string)
	go func() {
		var text strings.Builder
		buffer := make([]byte, 64<<10)
		for !strings.Contains(text.String(), "END") {
			n, err := screen.Read(buffer)
			if err != nil {
				break
			}
			text.Write(buffer[:n])
		}
		shown <- text.String()
	}()
	if err := reviewOf(t, everyWay).print(user, "table"); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(user, "END")
	text := <-shown
	if !strings.Contains(text, red+"slipped-past"+plain) {
		t.Errorf("no colours:\n%s", text)
	}
	table, _, _ := strings.Cut(text, "Slipped past the guard")
	for line := range strings.Lines(regexp.MustCompile("\x1b\\[[0-9]+m").ReplaceAllString(table, "")) {
		if n := len([]rune(strings.TrimRight(line, "\r\n"))); n > 90 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

// The first event waits until the progress shows.
func TestOnATerminalTheProgressShows(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.log")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		files []string
		// shows is a regular expression.
		shows string
	}{
		"packed":            {[]string{everyWay}, `reading +[0-9]+% .*B/s.*\[[0-9hms]+:[0-9hms]+\]`},
		"with an empty one": {[]string{empty, everyWay}, `reading +[0-9]+% .*B/s.*\[[0-9hms]+:[0-9hms]+\]`},
		"a pipe":            {[]string{"-"}, `reading \([0-9.]+ .?i?B, .*B/s\)`},
		"a pipe and a file": {[]string{everyWay, "-"}, `reading \([0-9.]+ .?i?B, .*B/s\)`},
	} {
		t.Run(name, func(t *testing.T) {
			user, screen := terminal(t, 120)
			seen := make(chan string, 1)
			go func() {
				var text strings.Builder
				progress := regexp.MustCompile(c.shows)
				buffer := make([]byte, 4<<10)
				for {
					n, err := screen.Read(buffer)
					text.Write(buffer[:n])
					if err != nil || progress.MatchString(text.String()) {
						seen <- text.String()
						return
					}
				}
			}()
			sources, err := auditlog.Sources(c.files, strings.NewReader(recordedLog(t)))
			if err != nil {
				t.Fatal(err)
			}
			shown := ""
			reader := &auditlog.Reader{Selection: auditlog.Selection{GuardNamespace: "eni-guard"}, Each: func(*auditlog.Event) {
				if shown == "" {
					shown = <-seen
				}
			}}
			if read, err := readShown(t.Context(), reader, sources, user); err != nil || read.Lines == 0 {
				t.Errorf("%+v, %v", read, err)
			}
			t.Logf("%q", shown)
		})
	}
}

// Of nothing, nothing is shown, and it ends.
func TestTheProgressOfNothing(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.log")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	user, _ := terminal(t, 120)
	sources, err := auditlog.Sources([]string{empty}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if read, err := readShown(t.Context(), &auditlog.Reader{}, sources, user); err != nil || read.Files != 1 {
		t.Errorf("%+v, %v", read, err)
	}
}
