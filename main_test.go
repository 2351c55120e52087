package main

import (
	"io"
	"strings"
	"testing"
)

// A script tells by the exit status whether it has asked wrongly.
func TestExitStatus(t *testing.T) {
	for args, want := range map[string]int{
		"version":                                0,
		"--help":                                 0,
		"":                                       64,
		"agnet":                                  64,
		"--no-such-flag":                         64,
		"version now":                            64,
		"version --no-such-flag":                 64,
		"agent --node-name=":                     64,
		"agent --leftover-grace=x":               64,
		"webhook --mode=x":                       64,
		"webhook x":                              64,
		"webhook --port=0":                       64,
		"webhook free-held x":                    64,
		"webhook free-held --webhook-timeout=0s": 64,
		"webhook free-held --webhook-timeout=31s": 64,
		"inspect":                   64,
		"check":                     64,
		"check shop/web-0":          64,
		"inspect --ip=10.0.0.256":   64,
		"webhook --log-format=loud": 64,
	} {
		t.Run(args, func(t *testing.T) {
			cmd := newCommand()
			cmd.SetArgs(strings.Fields(args))
			cmd.SetOut(io.Discard)
			if got := exitStatus(cmd.ExecuteContext(t.Context())); got != want {
				t.Errorf("exit status %d, want %d", got, want)
			}
		})
	}
}

// Who mistypes a command is told of that, and not of the flags that go with it.
func TestACommandThatDoesNotExist(t *testing.T) {
	for args, want := range map[string]string{
		"inspekt --ip 10.0.0.1": `there is no command "inspekt"; did you mean inspect?`,
		"audti -o json x.log":   `there is no command "audti"; did you mean audit?`,
		"remove":                `there is no command "remove"`,
	} {
		t.Run(args, func(t *testing.T) {
			cmd := newCommand()
			cmd.SetArgs(strings.Fields(args))
			if err := cmd.ExecuteContext(t.Context()); err == nil || err.Error() != want {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
}
