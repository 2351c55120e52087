// Package logging makes the one logger of a process: zap behind logr, so that Kubernetes libraries use it too.
package logging

import (
	"fmt"
	stdlog "log"
	"os"
	"strings"

	"github.com/go-logr/logr"
	"github.com/go-logr/zapr"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// Options are the flags about logging.
type Options struct {
	format string
}

// AddFlags adds --log-format.
func (o *Options) AddFlags(flags *pflag.FlagSet) {
	flags.StringVar(&o.format, "log-format", "auto", "how to log to standard error: json, text, or auto (text on a terminal)")
}

// Logger returns the logger, and sends what the standard library logs there too. Or it returns an error that names the flag that is wrong.
func (o *Options) Logger() (logr.Logger, error) {
	encoding := zap.NewProductionEncoderConfig()
	encoding.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	var encoder zapcore.Encoder
	switch {
	case o.format == "json", o.format == "auto" && !term.IsTerminal(int(os.Stderr.Fd())):
		encoder = zapcore.NewJSONEncoder(encoding)
	case o.format == "text", o.format == "auto":
		encoding.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(encoding)
	default:
		return logr.Logger{}, fmt.Errorf("--log-format %q is not json, text or auto", o.format)
	}
	core := zapcore.NewCore(encoder, zapcore.Lock(os.Stderr), zapcore.InfoLevel)
	log := zapr.NewLogger(zap.New(core))
	// What servers of libraries print, such as failed TLS handshakes, must not come between lines of JSON.
	stdlog.SetFlags(0)
	stdlog.SetOutput(writer{log})
	return log, nil
}

// Standard returns a logger for libraries that want one of the standard library.
func Standard(log logr.Logger) *stdlog.Logger {
	return stdlog.New(writer{log}, "", 0)
}

type writer struct{ log logr.Logger }

func (w writer) Write(line []byte) (int, error) {
	w.log.Info("server", "message", strings.TrimSpace(string(line)))
	return len(line), nil
}
