// Package exitstatus is how commands end when their exit status is part of their answer.
package exitstatus

import "fmt"

// Error ends a command with this exit status. By itself it says everything, and nothing is printed.
type Error int

// Usage is for what cannot be asked: a wrong flag, say (EX_USAGE of sysexits.h).
const Usage = 64

func (e Error) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// With gives an error that is printed the status to end with.
func With(status int, err error) error { return explainedError{err, Error(status)} }

type explainedError struct {
	error
	status Error
}

func (e explainedError) Unwrap() []error { return []error{e.error, e.status} }
