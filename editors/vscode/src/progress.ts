/** Work of the server that the user can watch and stop. */
import * as vscode from "vscode";

export class Bar {
  private readonly progress: Promise<vscode.Progress<{ message?: string; increment?: number }>>;
  private end_!: () => void;
  private percent = 0;
  readonly ended = new Promise<void>((resolve) => (this.end_ = resolve));

  constructor(title: string, stop: () => void) {
    this.progress = new Promise((resolve) => {
      const options = { location: vscode.ProgressLocation.Notification, title: `DeepSeek: ${title}`, cancellable: true };
      void vscode.window.withProgress(options, (progress, stopped) => {
        stopped.onCancellationRequested(stop);
        resolve(progress);
        return this.ended;
      });
    });
  }

  async report(message: string | undefined, percent: number | undefined): Promise<void> {
    const increment = percent === undefined ? undefined : percent - this.percent;
    this.percent = percent ?? this.percent;
    (await this.progress).report({ message, increment });
  }

  end(): void {
    this.end_();
  }
}
